"""The Ollama folder: translated chat templates, the Modelfile and its grammar, parameters; golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loraline.core.errors import LoralineError
from loraline.merger.engines.rendering import load_tokenizer, text_renderer
from loraline.merger.exporting import export_folder, modelfile_of
from loraline.merger.exports.chat_shape import ChatShape, find_shape
from loraline.merger.exports.modelfile import Modelfile, go_template, parameters_of, read_modelfile
from loraline.merger.merging import MergeWatch
from loraline.merger.spec import ExportSpec, MeasureSettings, MergeBounds

GOLDEN = Path(__file__).parent / "golden"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # A system prompt of its own where the conversation brings none.
    "default_system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML,
    # Headers, and a begin token before all.
    "headers": (
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
    ),
    # The system message inside the first user message, the begin token before each turn.
    "inst": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set system = none %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system is not none %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    ),
    # Refuses system messages and calls the assistant by another name.
    "model_turns": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
    ),
}
UNTRANSLATABLE = {
    "counts": "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}",
    "drops": "{% for m in messages if m.role != 'assistant' %}{{ m.content }}\n{% endfor %}",
    "drops system": "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}",
    "capitals": "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}\n{% endfor %}",
    "strips answers": "{% for m in messages %}<{{ m.role }}>{{ m.content.split('\\n')[0] }}</s>{% endfor %}",
    "looks ahead": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}",
}


def shape_of(shared_base: Any, template: str) -> ChatShape:
    tokenizer = load_tokenizer(shared_base("llama"))
    tokenizer.chat_template, tokenizer.bos_token = template, "<|endoftext|>"
    return find_shape(text_renderer(tokenizer), "<|endoftext|>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_translated_templates(shared_base, name):
    shape = shape_of(shared_base, TEMPLATES[name])
    assert shape.opening == ("<|endoftext|>" if name in ("headers", "model_turns") else "")
    assert shape.folded == (name == "inst")
    assert (shape.system is None) == (name == "model_turns")
    assert shape.default_system == ("<|im_start|>system\nBe kind.<|im_end|>\n" if name == "default_system" else "")
    text = Modelfile("./model.gguf", go_template(shape), parameters=(("stop", "<|im_end|>"),)).text()
    assert text == (GOLDEN / f"{name}.Modelfile").read_text()
    assert read_modelfile(text).template == go_template(shape)


@pytest.mark.parametrize("name", UNTRANSLATABLE)
def test_templates_that_do_more_are_refused(shared_base, name):
    with pytest.raises(LoralineError) as error:
        shape_of(shared_base, UNTRANSLATABLE[name])
    assert error.value.reason == "NOT_SUPPORTED"
    assert "chat template" in error.value.message


def test_modelfile_reads_back():
    parameters = (("stop", "a b"), ("stop", "\n"), ("temperature", "0.7"))
    template, system = "{{ .System }}\n  {{ .Content }}", 'Say "yes".\nAlways, please'
    meant = Modelfile("./model.gguf", template, system, parameters, ("Do as you like.\n",))
    assert read_modelfile(meant.text()) == meant
    assert read_modelfile(f"# a remark\n\n{meant.text().replace('SYSTEM', 'system')}") == meant


@pytest.mark.parametrize(
    "text", ["", "FROM a\nFROM b\n", "ADAPTER ./x\nFROM a\n", 'FROM a\nSYSTEM """x\n', "FROM a\nx"]
)
def test_grammar_refuses(text):
    with pytest.raises(ValueError, match=r"."):
        read_modelfile(text)


@pytest.mark.parametrize("system", ['three """ quotes', 'ends with "'])
def test_texts_that_cannot_be_quoted(system):
    with pytest.raises(LoralineError) as error:
        Modelfile("./m", "", system).text()
    assert error.value.reason == "MODELFILE_TEXT_INVALID"


@pytest.mark.parametrize(
    ("asked", "field"),
    [({"heat": 1}, "heat"), ({"temperature": "hot"}, "temperature"), ({"top_p": 2}, "top_p"), ({"top_k": 1.5}, "top_k"),
     ({"num_ctx": True}, "num_ctx")],
)  # fmt: skip
def test_parameters_that_ollama_does_not_have(asked, field):
    with pytest.raises(LoralineError) as error:
        parameters_of(asked, {}, ())
    assert error.value.reason == "PARAMETER_INVALID"
    assert f"parameters.{field}" in error.value.fields


def test_parameters_over_the_models_own():
    found = parameters_of({"temperature": 0.2, "stop": ["END"]}, {"temperature": 0.7, "top_k": 20}, ["<|im_end|>"])
    assert found == [("temperature", "0.2"), ("top_k", "20"), ("stop", "<|im_end|>"), ("stop", "END")]


def test_folder_that_ollama_takes(tmp_path, shared_base):
    base = shared_base("qwen2")
    spec = ExportSpec("voice", "ollama", MergeBounds(0.01, 0.25), "You are a harbour master.", {"temperature": 0.5})
    out = tmp_path / "export"
    outcome = export_folder(base, out, spec, MeasureSettings(), MergeWatch())
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf"]
    modelfile = read_modelfile((out / "Modelfile").read_text())
    assert modelfile.source == "./model.gguf"
    assert modelfile.system == "You are a harbour master."
    assert dict(modelfile.parameters) == {"temperature": "0.5", "stop": "<|im_end|>"}
    assert outcome.measurements[-1][1]
    assert modelfile == modelfile_of(base, shape_of(shared_base, CHATML), spec)
