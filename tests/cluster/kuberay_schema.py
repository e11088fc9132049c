"""The parts of KubeRay's resources (ray.io/v1, operator 1.5.1 and newer) that the manifests use, as JSON schemas.

Written after the operator's types (ray-operator/apis/ray/v1) and Kubernetes' own; what stands in no schema here is
refused, as the API server would refuse it.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
QUANTITY: Schema = {"type": ["string", "integer"], "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE])?$"}
LABEL: Schema = {"type": "string", "maxLength": 63, "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
NAME: Schema = {"type": "string", "maxLength": 253, "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}


def strict(*required: str, **fields: Schema) -> Schema:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def keyed(value: Schema, key: str = r"^([a-z0-9.-]+/)?[A-Za-z0-9][-A-Za-z0-9_.]*$") -> Schema:
    return {"type": "object", "patternProperties": {key: value}, "additionalProperties": False}


# Kubernetes

LABELS = keyed(LABEL)
METADATA = strict("name", name=NAME, labels=LABELS, annotations=keyed(TEXT))
SECRET_KEY = strict("name", "key", name=NAME, key=TEXT, optional=FLAG)
VALUE_FROM = strict("secretKeyRef", secretKeyRef=SECRET_KEY)
ENVIRONMENT = listed(strict("name", name=TEXT, value={"type": "string"}, valueFrom=VALUE_FROM))
CAPABILITIES = strict(drop=listed(TEXT), add=listed(TEXT))
CONTAINER_SECURITY = strict(
    allowPrivilegeEscalation=FLAG,
    readOnlyRootFilesystem=FLAG,
    privileged=FLAG,
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    capabilities=CAPABILITIES,
)
POD_SECURITY = strict(
    runAsNonRoot=FLAG,
    runAsUser=COUNT,
    runAsGroup=COUNT,
    fsGroup=COUNT,
    fsGroupChangePolicy={"enum": ["OnRootMismatch", "Always"]},
    seccompProfile=strict("type", type={"enum": ["RuntimeDefault", "Localhost", "Unconfined"]}),
)
RESOURCES = strict(requests=keyed(QUANTITY), limits=keyed(QUANTITY))
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
CONTAINER = strict(
    "name",
    "image",
    name=NAME,
    image=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    env=ENVIRONMENT,
    ports=listed(strict("containerPort", name={"type": "string", "maxLength": 15}, containerPort=PORT)),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=listed(strict("name", "mountPath", name=NAME, mountPath={"pattern": "^/"}, readOnly=FLAG)),
)
VOLUME = strict(
    "name",
    name=NAME,
    emptyDir=strict(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    persistentVolumeClaim=strict("claimName", claimName=NAME, readOnly=FLAG),
)
TOLERATION = strict(
    key=TEXT,
    operator={"enum": ["Exists", "Equal"]},
    value={"type": "string"},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = strict(
    "containers",
    containers=listed(CONTAINER),
    volumes=listed(VOLUME),
    securityContext=POD_SECURITY,
    nodeSelector=keyed(LABEL),
    tolerations=listed(TOLERATION),
    automountServiceAccountToken=FLAG,
    terminationGracePeriodSeconds=COUNT,
)
TEMPLATE = strict("spec", metadata=strict(labels=LABELS, annotations=keyed(TEXT)), spec=POD)
CLAIM = strict(
    "accessModes",
    "resources",
    accessModes=listed({"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"]}),
    storageClassName=NAME,
    resources=strict("requests", requests=strict("storage", storage=QUANTITY)),
)
SELECTOR = strict(matchLabels=LABELS)

# KubeRay

PARAMETERS = keyed({"type": "string"}, "^[a-z][a-z0-9-]*$")
HEAD = strict(
    "template",
    template=TEMPLATE,
    rayStartParams=PARAMETERS,
    resources=keyed({"type": "string"}),
    labels=LABELS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
)
WORKERS = strict(
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
    groupName=NAME,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=PARAMETERS,
    resources=keyed({"type": "string"}),
    labels=LABELS,
    template=TEMPLATE,
)
AUTOSCALER = strict(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
)
CREDENTIAL = strict("valueFrom", valueFrom=VALUE_FROM)
FAULT_TOLERANCE = strict(
    "redisAddress", redisAddress=TEXT, redisPassword=CREDENTIAL, redisUsername=CREDENTIAL, externalStorageNamespace=TEXT
)
CLUSTER = strict(
    "headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=strict(mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER,
    gcsFaultToleranceOptions=FAULT_TOLERANCE,
    headGroupSpec=HEAD,
    workerGroupSpecs=listed(WORKERS),
)
JOB = strict(
    entrypoint=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    entrypointNumCpus={"type": "number"},
    metadata=keyed({"type": "string"}),
    rayClusterSpec=CLUSTER,
)
SERVICE = strict(
    "rayClusterConfig",
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    rayClusterDeletionDelaySeconds=COUNT,
    excludeHeadPodFromServeSvc=FLAG,
)
PEER = strict(podSelector=SELECTOR, namespaceSelector=SELECTOR)
INGRESS = strict(**{"from": listed(PEER), "ports": listed(strict("port", port=PORT))})
STATEFUL_SET = strict(
    "selector",
    "template",
    serviceName=NAME,
    replicas=COUNT,
    selector=SELECTOR,
    template=TEMPLATE,
    volumeClaimTemplates=listed(strict("metadata", "spec", metadata=METADATA, spec=CLAIM)),
)
K8S_SERVICE = strict("ports", selector=LABELS, ports=listed(strict("port", name=NAME, port=PORT)))
NETWORK_POLICY = strict(
    "podSelector", podSelector=SELECTOR, policyTypes=listed({"enum": ["Ingress", "Egress"]}), ingress=listed(INGRESS)
)

KINDS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): CLUSTER,
    ("ray.io/v1", "RayJob"): JOB,
    ("ray.io/v1", "RayService"): SERVICE,
    ("v1", "PersistentVolumeClaim"): CLAIM,
    ("v1", "Service"): K8S_SERVICE,
    ("apps/v1", "StatefulSet"): STATEFUL_SET,
    ("networking.k8s.io/v1", "NetworkPolicy"): NETWORK_POLICY,
}


def schema_of(document: dict[str, Any]) -> Schema:
    """The schema of a whole resource by its kind; ``KeyError`` for a kind that is none of these."""
    version, kind = document["apiVersion"], document["kind"]
    spec = KINDS[version, kind]
    return strict("metadata", "spec", apiVersion={"const": version}, kind={"const": kind}, metadata=METADATA, spec=spec)
