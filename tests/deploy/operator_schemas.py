"""JSON schemas of the operators' objects, as far as the manifests use them: fields, what is required, enums and bounds.

Written after the definitions of the Prometheus operator (v1), KEDA (v1alpha1) and Kueue (v1beta2); a field that is not
here is refused, so a new one is looked up in them first.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
STRING: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
STRINGS: Schema = {"type": "object", "additionalProperties": STRING}
INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
DURATION: Schema = {"type": "string", "minLength": 1, "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?$"}
QUANTITY: Schema = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"},
    ]
}


def fields(required: str = "", **properties: Schema) -> Schema:
    """Return an object of these fields and no others; `required` names some, separated by spaces."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def some(items: Schema, least: int = 1, most: int = 1000) -> Schema:
    """Return a list of such items."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: str) -> Schema:
    """Return an enumeration."""
    return {"enum": list(values)}


def number(low: int, high: int = 2**31 - 1) -> Schema:
    """Return a bounded integer."""
    return {"type": "integer", "minimum": low, "maximum": high}


SELECTOR = fields(
    matchLabels=STRINGS,
    matchExpressions=some(
        fields(
            "key operator", key=STRING, operator=one_of("In", "NotIn", "Exists", "DoesNotExist"), values=some(STRING)
        )
    ),
)
RELABELING = fields(
    action=one_of("replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase"),
    sourceLabels=some({"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}),
    targetLabel=STRING,
    regex=STRING,
    replacement=STRING,
    separator=STRING,
)
ENDPOINT = fields(
    "port", port=NAME, path={"type": "string", "pattern": "^/"}, interval=DURATION, scrapeTimeout=DURATION,
    relabelings=some(RELABELING),
)  # fmt: skip
RULE: Schema = {
    **fields(
        "expr",
        alert=STRING,
        record={"type": "string", "pattern": "^[a-zA-Z_:][a-zA-Z0-9_:]*$"},
        expr={"type": "string", "minLength": 1},
        labels=STRINGS,
        annotations=STRINGS,
        **{"for": DURATION, "keep_firing_for": {**DURATION}},
    ),
    "oneOf": [
        {"required": ["alert"], "not": {"required": ["record"]}},
        {"required": ["record"], "not": {"anyOf": [{"required": ["for"]}, {"required": ["annotations"]}]}},
    ],
}
SCALING = fields(
    stabilizationWindowSeconds=number(0, 3600),
    selectPolicy=one_of("Max", "Min", "Disabled"),
    policies=some(
        fields(
            "type value periodSeconds", type=one_of("Pods", "Percent"), value=number(1), periodSeconds=number(1, 1800)
        )
    ),
)
TRIGGER = fields(
    "type metadata",
    type=one_of("prometheus"),
    metricType=one_of("AverageValue", "Value"),
    metadata=fields(
        "serverAddress query threshold",
        serverAddress={"type": "string", "pattern": r"^https?://[a-z0-9.-]+:\d+$"},
        query={"type": "string", "minLength": 1},
        threshold={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
        activationThreshold={"type": "string", "pattern": r"^\d+(\.\d+)?$"},
    ),
)
QUOTA = fields("name nominalQuota", name=STRING, nominalQuota=QUANTITY, borrowingLimit=QUANTITY, lendingLimit=QUANTITY)

SPECS: dict[str, Schema] = {
    "ServiceMonitor monitoring.coreos.com/v1": fields(
        "selector endpoints",
        selector=SELECTOR,
        namespaceSelector=fields(matchNames=some(NAME), any={"type": "boolean"}),
        endpoints=some(ENDPOINT),
    ),
    "PrometheusRule monitoring.coreos.com/v1": fields(
        groups=some(fields("name rules", name=STRING, interval=DURATION, limit=number(0), rules=some(RULE)))
    ),
    "ScaledObject keda.sh/v1alpha1": fields(
        "scaleTargetRef triggers",
        scaleTargetRef=fields("name", name=NAME, kind=STRING, apiVersion=STRING),
        minReplicaCount=number(0),
        maxReplicaCount=number(1),
        pollingInterval=number(1),
        cooldownPeriod=number(0),
        fallback=fields(
            "failureThreshold replicas",
            failureThreshold=number(0),
            replicas=number(0),
            behavior=one_of("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
        ),
        advanced=fields(
            horizontalPodAutoscalerConfig=fields(behavior=fields(scaleUp=SCALING, scaleDown=SCALING)),
        ),
        triggers=some(TRIGGER),
    ),
    "ResourceFlavor kueue.x-k8s.io/v1beta2": fields(nodeLabels={**STRINGS, "maxProperties": 8}),
    "ClusterQueue kueue.x-k8s.io/v1beta2": fields(
        namespaceSelector=SELECTOR,
        preemption=fields(
            withinClusterQueue=one_of("Never", "LowerPriority", "LowerOrNewerEqualPriority"),
            reclaimWithinCohort=one_of("Never", "LowerPriority", "Any"),
        ),
        queueingStrategy=one_of("StrictFIFO", "BestEffortFIFO"),
        resourceGroups=some(
            fields(
                "coveredResources flavors",
                coveredResources=some(STRING, most=64),
                flavors=some(fields("name resources", name=NAME, resources=some(QUOTA, most=64)), most=64),
            ),
            most=16,
        ),
    ),
    "LocalQueue kueue.x-k8s.io/v1beta2": fields("clusterQueue", clusterQueue=NAME),
}
"""Kind and version -> schema of the `spec`."""

HEAD: Schema = {"apiVersion": STRING, "kind": STRING, "metadata": {"type": "object", "required": ["name"]}}
WHOLE: dict[str, Schema] = {kind: fields("metadata spec", **HEAD, spec=spec) for kind, spec in SPECS.items()}
WHOLE["ResourceFlavor kueue.x-k8s.io/v1beta2"]["required"] = ["metadata"]
WHOLE["WorkloadPriorityClass kueue.x-k8s.io/v1beta2"] = fields(
    "metadata value", **HEAD, value=INT32, description={**STRING, "maxLength": 2048}
)
"""Kind and version -> schema of the object."""
