"""A small platform in memory: the services' contract without the work. Started as a script it prints its address.

Behaviours on purpose: a run with epochs 13 fails the first time it is started; one with epochs 99 takes a minute;
the key `wrong` is refused; the model `missing` is not found; the adapter's style is "little sailor".
"""

# pyright: reportAbstractUsage=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import asyncio
import hashlib

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraline.api.artifact.v1 import artifact_pb2, artifact_pb2_grpc
from loraline.api.datagen.v1 import datagen_pb2, datagen_pb2_grpc
from loraline.api.inference.v1 import inference_pb2, inference_pb2_grpc
from loraline.api.job.v1 import job_pb2, job_pb2_grpc
from loraline.api.merger.v1 import merger_pb2, merger_pb2_grpc
from loraline.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)


def status(code, reason, message, **fields):
    details = [any_pb2.Any() for _ in range(3)]
    details[0].Pack(error_details_pb2.ErrorInfo(reason=reason, domain="loraline", metadata={"hint": "x"}))
    violations = [error_details_pb2.BadRequest.FieldViolation(field=k, description=v) for k, v in fields.items()]
    details[1].Pack(error_details_pb2.BadRequest(field_violations=violations))
    link = error_details_pb2.Help.Link(description="what to do", url=f"https://example.org/help#{reason.lower()}")
    details[2].Pack(error_details_pb2.Help(links=[link]))
    return status_pb2.Status(code=code.value[0], message=message, details=details)


async def refuse(context, code, reason, message, **fields):
    await context.abort_with_status(rpc_status.to_status(status(code, reason, message, **fields)))


class Platform:
    """The state, and how jobs run."""

    def __init__(self):
        self.jobs: dict[str, job_pb2.Job] = {}
        self.events: dict[str, list[job_pb2.JobEvent]] = {}
        self.work: dict[str, tuple] = {}
        self.changed = asyncio.Condition()
        self.artifacts: list[artifact_pb2.Artifact] = []
        self.contents: dict[str, dict[str, bytes]] = {}
        self.aliases: dict[tuple[int, str, str], int] = {}
        self.base: artifact_pb2.ArtifactRef | None = None
        self.adapters: dict[str, inference_pb2.ServedModel] = {}
        self.tasks: set[asyncio.Task] = set()
        self.calls: list[str] = []
        self.break_watch_after = 0

    def publish(self, kind, name, files, job=""):
        entries = [
            artifact_pb2.ArtifactFile(path=p, size_bytes=len(b), sha256=hashlib.sha256(b).hexdigest())
            for p, b in sorted(files.items())
        ]
        digest = "sha256:" + hashlib.sha256(repr([(f.path, f.sha256) for f in entries]).encode()).hexdigest()
        versions = [a for a in self.artifacts if (a.ref.kind, a.ref.name) == (kind, name)]
        if versions and versions[-1].digest == digest:
            return versions[-1], True
        ref = artifact_pb2.ArtifactRef(kind=kind, name=name, version=len(versions) + 1, digest=digest)
        artifact = artifact_pb2.Artifact(
            ref=ref,
            digest=digest,
            size_bytes=sum(map(len, files.values())),
            job=job,
            files=entries,
            location=f"/store/{name}/v{ref.version}",
        )
        artifact.create_time.GetCurrentTime()
        self.artifacts.append(artifact)
        self.contents[digest + f"{kind}{name}"] = dict(files)
        return artifact, False

    def find(self, ref):
        versions = [a for a in self.artifacts if (a.ref.kind, a.ref.name) == (ref.kind, ref.name)]
        which = ref.WhichOneof("selector")
        if which == "alias":
            number = self.aliases.get((ref.kind, ref.name, ref.alias), 0)
            versions = [a for a in versions if a.ref.version == number]
        elif which == "version":
            versions = [a for a in versions if a.ref.version == ref.version]
        return versions[-1] if versions else None

    async def submit(self, kind, request, work, context):
        for job in self.jobs.values():
            if request.request_id and job.request_id == request.request_id:
                old = type(request)()
                job.spec.Unpack(old)
                if old != request:
                    await refuse(context, grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", "other body")
                return job
        name = f"{kind}-{len(self.jobs):012d}"
        job = job_pb2.Job(name=name, kind=kind, request_id=request.request_id)
        job.spec.Pack(request)
        job.create_time.GetCurrentTime()
        if "labels" in request.DESCRIPTOR.fields_by_name:
            job.labels.update(request.labels)
        self.jobs[name], self.events[name], self.work[name] = job, [], (request, work)
        await self.start(name)
        return job

    async def start(self, name):
        await self.event(name, state=job_pb2.JOB_STATE_QUEUED)
        task = asyncio.create_task(self.run(name))
        self.tasks.add(task)

    async def event(self, name, state=None, **kwargs):
        job = self.jobs[name]
        if state is not None:
            change = job_pb2.StateChange(to=state)
            setattr(change, "from", job.state)
            kwargs["state_change"] = change
            job.state = state
        job.last_sequence += 1
        event = job_pb2.JobEvent(sequence=job.last_sequence, attempt=job.attempt, **kwargs)
        if "progress" in kwargs:
            job.progress.CopyFrom(kwargs["progress"])
        async with self.changed:
            self.events[name].append(event)
            self.changed.notify_all()

    async def run(self, name):
        job = self.jobs[name]
        request, work = self.work[name]
        job.attempt += 1
        await asyncio.sleep(0.01)
        await self.event(name, state=job_pb2.JOB_STATE_RUNNING)
        job.start_time.GetCurrentTime()
        try:
            kind, artifact_name, files, result = await work(self, job, request)
        except Stopped as stopped:
            await self.event(name, state=stopped.state)
            return
        except ValueError as error:
            job.error.CopyFrom(
                status(grpc.StatusCode.INVALID_ARGUMENT, "BAD_ROWS", str(error), rows="train.jsonl:17 is empty")
            )
            job.end_time.GetCurrentTime()
            await self.event(name, state=job_pb2.JOB_STATE_FAILED)
            return
        artifact, _ = self.publish(kind, artifact_name, files, name)
        job.outputs.append(artifact.ref)
        await self.event(name, published=artifact.ref)
        result_message, ref_field = result
        getattr(result_message, ref_field).CopyFrom(artifact.ref)
        job.result.Pack(result_message)
        job.end_time.GetCurrentTime()
        await self.event(name, state=job_pb2.JOB_STATE_SUCCEEDED)

    async def progress(self, job, step, total, seconds=0.01):
        await asyncio.sleep(seconds)
        stop = {"cancel": job_pb2.JOB_STATE_CANCELLED, "pause": job_pb2.JOB_STATE_PAUSED}.get(job.requested_stop)
        if stop:
            if stop == job_pb2.JOB_STATE_PAUSED:
                job.pause.CopyFrom(job_pb2.PauseInfo(reason="USER_REQUEST", message="paused because someone asked"))
            job.requested_stop = ""
            raise Stopped(stop)
        metrics = {"loss": 7.0 / (step + 1)}
        value = job_pb2.Progress(fraction=step / total, step=step, total_steps=total, unit="step", metrics=metrics)
        await self.event(job.name, progress=value)


class Stopped(Exception):
    def __init__(self, state):
        super().__init__(state)
        self.state = state


async def convert_work(platform, job, request):
    await platform.progress(job, 1, 1)
    if request.source.subpath == "nobody":
        raise ValueError("Nobody speaks here.")
    note = job_pb2.Note(severity=job_pb2.SEVERITY_WARNING, message="2 rows set aside \x1b[31m")
    await platform.event(job.name, note=note)
    files = {"train.jsonl": f"{request.source.subpath} {request.source.artifact.digest}".encode()}
    return (
        artifact_pb2.ARTIFACT_KIND_DATASET,
        request.name,
        files,
        (datagen_pb2.DatasetResult(train_rows=40, validation_rows=2), "dataset"),
    )


async def tiny_work(platform, job, request):
    steps, seconds = (100, 0.6) if request.steps == 999 else (4, 0.01)
    for step in range(steps):
        await platform.progress(job, step + 1, steps, seconds)
    files = {"config.json": b"{}", "model.safetensors": b"x" * 3_000_000, "empty.txt": b""}
    return artifact_pb2.ARTIFACT_KIND_MODEL, request.name or "tiny", files, (trainer_pb2.ModelResult(), "model")


async def train_work(platform, job, request):
    if request.parameters.epochs == 13 and job.attempt == 1:
        raise ValueError("The dataset holds rows without an answer.")
    seconds = 0.6 if request.parameters.epochs == 99 else 0.01
    for step in range(100 if request.parameters.epochs == 99 else 8):
        await platform.progress(job, step + 1, 100 if request.parameters.epochs == 99 else 8, seconds)
    result = trainer_pb2.TrainResult(
        final_loss=0.4,
        receipt=trainer_pb2.ReceiptSummary(rows=40, tokens=900, trained_tokens=500, rows_teaching_eos=40),
        probes=trainer_pb2.ProbeSummary(
            probes=8, max_abs_logprob_shift=6.0, mean_base_logprob=-5.0, mean_adapter_logprob=-0.5
        ),
        loss_curve=[trainer_pb2.LossPoint(step=i + 1, loss=7.0 / (i + 1)) for i in range(8)],
    )
    files = {"adapter_model.safetensors": request.SerializeToString(deterministic=True)}
    return artifact_pb2.ARTIFACT_KIND_ADAPTER, request.name, files, (result, "adapter")


async def merge_work(platform, job, request):
    await platform.progress(job, 1, 1)
    row = merger_pb2.MergeMeasurement(
        subject="merged fp32",
        tokens=100,
        mean_kl=1e-8,
        max_abs_logprob_diff=1e-5,
        top1_agreement=1.0,
        base_to_adapter_diff=6.0,
        within_bound=True,
    )
    files = {"model.safetensors": request.SerializeToString(deterministic=True)}
    return (
        artifact_pb2.ARTIFACT_KIND_MODEL,
        request.name,
        files,
        (merger_pb2.MergeResult(measurements=[row]), "model"),
    )


class Part:
    def __init__(self, platform):
        self.p = platform


class Jobs(Part, job_pb2_grpc.JobServiceServicer):
    async def job(self, name, context):
        if name not in self.p.jobs:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", f"There is no job {name}.")
        return self.p.jobs[name]

    async def GetJob(self, request, context):
        return job_pb2.GetJobResponse(job=await self.job(request.name, context))

    async def ListJobs(self, request, context):
        found = [
            job
            for job in reversed(self.p.jobs.values())
            if job.kind.startswith(request.kind_prefix)
            and (not request.states or job.state in request.states)
            and all(job.labels.get(k) == v for k, v in request.labels.items())
        ]
        begin, size = int(request.page_token or 0), min(request.page_size or 50, 3)
        more = str(begin + size) if begin + size < len(found) else ""
        return job_pb2.ListJobsResponse(jobs=found[begin : begin + size], next_page_token=more)

    async def WatchJob(self, request, context):
        job = await self.job(request.name, context)
        at, sent = request.after_sequence, 0
        self.p.calls.append(f"WatchJob after {at}")
        while True:
            while at < len(self.p.events[request.name]):
                if self.p.break_watch_after and sent >= self.p.break_watch_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")  # type: ignore[misc]
                event = self.p.events[request.name][at]
                at, sent = event.sequence, sent + 1
                yield job_pb2.WatchJobResponse(event=event, job=job)
            if job.state in ENDED:
                return
            async with self.p.changed:
                await self.p.changed.wait_for(lambda at=at: at < len(self.p.events[request.name]))

    async def CancelJob(self, request, context):
        job = await self.job(request.name, context)
        if job.state not in ENDED:
            job.requested_stop = "cancel"
        return job_pb2.CancelJobResponse(job=job)

    async def PauseJob(self, request, context):
        job = await self.job(request.name, context)
        job.requested_stop = "pause"
        return job_pb2.PauseJobResponse(job=job)

    async def ResumeJob(self, request, context):
        job = await self.job(request.name, context)
        if job.state not in (3, 5, 6):
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_RESUMABLE", "It runs or is done.")
        await self.p.start(request.name)
        return job_pb2.ResumeJobResponse(job=job)

    async def DeleteJob(self, request, context):
        job = await self.job(request.name, context)
        del self.p.jobs[job.name]
        return job_pb2.DeleteJobResponse()


class Artifacts(Part, artifact_pb2_grpc.ArtifactServiceServicer):
    async def artifact(self, ref, context) -> artifact_pb2.Artifact:
        found = self.p.find(ref)
        if found is None:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "ARTIFACT_NOT_FOUND", f"There is no {ref.name}.")
        assert found is not None
        return found

    async def GetArtifact(self, request, context):
        return artifact_pb2.GetArtifactResponse(artifact=await self.artifact(request.ref, context))

    async def ListArtifacts(self, request, context):
        found = [
            a
            for a in reversed(self.p.artifacts)
            if request.kind in (0, a.ref.kind) and request.name in ("", a.ref.name)
        ]
        return artifact_pb2.ListArtifactsResponse(artifacts=found)

    async def UploadArtifact(self, requests, context):
        header, files = None, {}
        async for part in requests:
            if part.WhichOneof("part") == "header":
                header = part.header
            else:
                files[part.chunk.path] = files.get(part.chunk.path, b"") + part.chunk.data
        assert header is not None
        artifact, unchanged = self.p.publish(header.kind, header.name, files)
        return artifact_pb2.UploadArtifactResponse(artifact=artifact, unchanged=unchanged)

    async def DownloadArtifact(self, request, context):
        artifact = await self.artifact(request.ref, context)
        yield artifact_pb2.DownloadArtifactResponse(artifact=artifact)
        files = self.p.contents[artifact.digest + f"{artifact.ref.kind}{artifact.ref.name}"]
        for path, data in sorted(files.items()):
            for begin in range(0, max(len(data), 1), 2**20):
                chunk = artifact_pb2.FileChunk(path=path, data=data[begin : begin + 2**20])
                yield artifact_pb2.DownloadArtifactResponse(chunk=chunk)

    async def VerifyArtifact(self, request, context):
        artifact = await self.artifact(request.ref, context)
        return artifact_pb2.VerifyArtifactResponse(artifact=artifact, verified_bytes=artifact.size_bytes)

    async def SetAlias(self, request, context):
        artifact = await self.artifact(request.ref, context)
        key = (artifact.ref.kind, artifact.ref.name, request.alias)
        change = artifact_pb2.AliasChange(
            alias=request.alias, from_version=self.p.aliases.get(key, 0), to_version=artifact.ref.version
        )
        self.p.aliases[key] = artifact.ref.version
        return artifact_pb2.SetAliasResponse(change=change)


class Datagen(Part, datagen_pb2_grpc.DatagenServiceServicer):
    async def ConvertDataset(self, request, context):
        job = await self.p.submit("datagen.convert", request, convert_work, context)
        return datagen_pb2.ConvertDatasetResponse(job=job)


class Trainer(Part, trainer_pb2_grpc.TrainerServiceServicer):
    async def Train(self, request, context):
        if request.existing_run == trainer_pb2.EXISTING_RUN_POLICY_FAIL:
            await refuse(context, grpc.StatusCode.ALREADY_EXISTS, "RUN_EXISTS", f"The run {request.name} exists.")
        if request.parameters.lora.r > 512:
            field = {"parameters.lora.r": "512 is the greatest rank that the server takes."}
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "RANK_TOO_HIGH", "The rank is too high.", **field)
        job = await self.p.submit("trainer.train", request, train_work, context)
        return trainer_pb2.TrainResponse(job=job)

    async def PlanRun(self, request, context):
        check = trainer_pb2.PlanCheck(code="NO_GPU", message="There is no GPU.", remedy="Take a machine with one.")
        return trainer_pb2.PlanRunResponse(ok=True, total_steps=8, memory_bytes={"total": 2500000000}, checks=[check])

    async def GetRun(self, request, context):
        jobs = [job for job in self.p.jobs.values() if job.kind == "trainer.train"]
        if not jobs:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "RUN_MISSING", "There is no such run.")
        points = [trainer_pb2.Checkpoint(step=8, epoch=3.0, loss=0.4)]
        run = trainer_pb2.Run(name=request.name, job=jobs[-1].name, state=jobs[-1].state, checkpoints=points)
        return trainer_pb2.GetRunResponse(run=run)

    async def CreateTinyModel(self, request, context):
        job = await self.p.submit("trainer.tiny", request, tiny_work, context)
        return trainer_pb2.CreateTinyModelResponse(job=job)


class Merger(Part, merger_pb2_grpc.MergerServiceServicer):
    async def Merge(self, request, context):
        job = await self.p.submit("merger.merge", request, merge_work, context)
        return merger_pb2.MergeResponse(job=job)


class Inference(Part, inference_pb2_grpc.InferenceServiceServicer):
    def base(self):
        model = inference_pb2.ServedModel(kind=inference_pb2.SERVED_KIND_BASE, resident=True)
        if self.p.base is not None:
            model.name = self.p.base.name
            model.artifact.CopyFrom(self.p.base)
        return model

    async def GetCapabilities(self, request, context):
        contract = trainer_pb2.ServingContract(max_lora_rank=64)
        loaded = {"engine": "fake", "base": self.base()} if self.p.base is not None else {}
        return inference_pb2.GetCapabilitiesResponse(contract=contract, **loaded)

    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse(models=[self.base(), *self.p.adapters.values()])

    async def LoadModel(self, request, context):
        self.p.calls.append("LoadModel")
        found = self.p.find(request.model.artifact)
        if found is None:
            await refuse(context, grpc.StatusCode.NOT_FOUND, "ARTIFACT_NOT_FOUND", "There is no such model.")
        assert found is not None
        self.p.base = found.ref
        return inference_pb2.LoadModelResponse(model=self.base())

    async def SetAlias(self, request, context):
        self.p.calls.append("inference.SetAlias")
        found = self.p.find(request.adapter)
        assert found is not None
        proof = inference_pb2.LoadProof(
            tokens=120,
            max_abs_diff_from_trainer=1e-4,
            mean_abs_diff_from_trainer=1e-5,
            max_abs_diff_from_base=6.0,
            bound=0.05,
            receipt_rows_matched=16,
        )
        model = inference_pb2.ServedModel(
            name=f"{found.ref.name}:v{found.ref.version}",
            kind=inference_pb2.SERVED_KIND_ADAPTER,
            artifact=found.ref,
            aliases=[request.alias],
            proof=proof,
            lora_rank=16,
        )
        self.p.adapters[found.ref.name] = model
        change = artifact_pb2.AliasChange(alias=request.alias, to_version=found.ref.version)
        return inference_pb2.SetAliasResponse(model=model, change=change)

    async def Chat(self, request, context):
        if request.model == "missing":
            await refuse(context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_SERVED", "No model `missing` is served.")
        users = [message.content for message in request.messages if message.role == "user"]
        system = "".join(message.content for message in request.messages if message.role == "system")
        style = "by the tide-bell, little sailor" if request.model else "bab\x1b[31mble"
        text = f"{style}: {users[-1]} (turn {len(users)}, t={request.sampling.temperature:g}{system and ', ' + system})"
        words = text.split(" ")
        for index, word in enumerate(words):
            piece = inference_pb2.ChatResponse(delta=word + (" " if index < len(words) - 1 else ""))
            if index == 0:
                piece.model = request.model or "base"
            yield piece
        yield inference_pb2.ChatResponse(finish_reason=inference_pb2.FINISH_REASON_STOP)


class KeyCheck(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation, details):
        if ("authorization", "Bearer wrong") in [(k, v) for k, v in details.invocation_metadata]:
            handler = await continuation(details)

            async def unary(_, context):
                await refuse(context, grpc.StatusCode.UNAUTHENTICATED, "INVALID_KEY", "The API key is not known.")

            if handler.response_streaming:
                return grpc.unary_stream_rpc_method_handler(
                    unary, handler.request_deserializer, handler.response_serializer
                )
            return grpc.unary_unary_rpc_method_handler(unary, handler.request_deserializer, handler.response_serializer)
        return await continuation(details)


async def start(platform: Platform, address: str = "127.0.0.1:0") -> tuple[grpc.aio.Server, str]:
    server = grpc.aio.server(interceptors=[KeyCheck()], options=[("grpc.so_reuseport", 0)])
    job_pb2_grpc.add_JobServiceServicer_to_server(Jobs(platform), server)
    artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(Artifacts(platform), server)
    datagen_pb2_grpc.add_DatagenServiceServicer_to_server(Datagen(platform), server)
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(Trainer(platform), server)
    merger_pb2_grpc.add_MergerServiceServicer_to_server(Merger(platform), server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(platform), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, f"127.0.0.1:{port}"


async def main():
    server, address = await start(Platform())
    print(address, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
