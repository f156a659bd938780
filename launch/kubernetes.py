"""Renders a job, or retraining on a timer, as Kubernetes objects, and hands them to kubectl.

Pure dictionaries become YAML. Secrets are named, never written: each is a key of one `Secret` that
an administrator has made.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from launch.job import RENDEZVOUS_PORT, JobSpec
from launch.schedule import Schedule
from pipeline.errors import InputError

Manifest = dict[str, Any]
CONFIG_FOLDER = "/etc/masklock"
WORK_FOLDER = "/workspace"


@dataclass(frozen=True)
class Cluster:
    """Where in a cluster the job runs."""

    image: str
    """Container image that has Masklock installed."""
    claim: str
    """PersistentVolumeClaim with data and runs; relative paths start there."""
    namespace: str = "default"
    secret: str = "masklock"
    """Secret whose keys are the variables that the job needs."""


def render(job: JobSpec, config_text: str, preset_text: str, cluster: Cluster) -> str:
    """ConfigMap, Service (several nodes) and Job, as one YAML stream.

    Args:
        job: what to run; its `config` is `CONFIG_FOLDER/config.yaml`.
        config_text: the run's YAML.
        preset_text: the accelerate configuration's YAML.
        cluster: where.
    """
    name = _name(job.name)
    files = {"config.yaml": config_text, "accelerate.yaml": preset_text}
    objects = [_config_map(name, files, cluster)]
    if job.resources.nodes > 1:
        objects.append(_service(name, cluster))
    return _stream([*objects, _job(name, job, cluster)])


def render_retraining(
    name: str, policy_text: str, schedule: Schedule, cluster: Cluster, secrets: Sequence[str] = ()
) -> str:
    """ConfigMap and CronJob that run `masklock retrain` by a schedule, one at a time."""
    name = _name(f"{name}-retrain")
    words = ["masklock", "retrain", f"{CONFIG_FOLDER}/policy.yaml", "--once"]
    pod = _pod(name, words, {"requests": {"cpu": "1", "memory": "4Gi"}}, secrets, cluster, 120)
    cron_job = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(name, cluster),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": "Etc/UTC",
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {"spec": {"backoffLimit": 0, "template": pod}},
        },
    }
    return _stream([_config_map(name, {"policy.yaml": policy_text}, cluster), cron_job])


def submit(manifests: str) -> str:
    """Apply them; what kubectl says.

    Raises:
        InputError: no kubectl here, or the cluster refuses them.
    """
    if shutil.which("kubectl") is None:
        raise InputError(
            "There is no kubectl on this machine. Write the objects with --dry-run > job.yaml, and "
            "run `kubectl apply -f job.yaml` where there is."
        )
    words = ["kubectl", "apply", "--filename", "-"]
    done = subprocess.run(words, input=manifests, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def _job(name: str, job: JobSpec, cluster: Cluster) -> Manifest:
    resources = job.resources
    words = job.accelerate_words(
        f"{CONFIG_FOLDER}/accelerate.yaml",
        "$(JOB_COMPLETION_INDEX)",
        f"{name}-0.{name}" if resources.nodes > 1 else "127.0.0.1",
    )
    pod = _pod(name, words, _limits(job), job.secrets, cluster, job.grace_seconds + 10)
    pod["spec"]["containers"][0]["env"] += [
        {"name": "OMP_NUM_THREADS", "value": str(resources.cpus_per_process)},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(job.grace_seconds)},
    ]
    if resources.nodes > 1:
        pod["spec"]["subdomain"] = name
    deadline = {"activeDeadlineSeconds": resources.seconds} if resources.seconds else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(name, cluster),
        "spec": {
            "completionMode": "Indexed",
            "completions": resources.nodes,
            "parallelism": resources.nodes,
            "backoffLimit": 3 * resources.nodes,  # nodes of one training fail together
            # A drained or preempted node is no failure: the training has saved, and goes on.
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {"operator": "In", "values": [2]},  # bad input stays bad
                    },
                ]
            },
            **deadline,
            "template": pod,
        },
    }


def _limits(job: JobSpec) -> Manifest:
    resources = job.resources
    limits = {"cpu": str(resources.cpus_per_node)}
    if resources.memory_per_node:
        limits["memory"] = f"{resources.memory_per_node}i"
    if resources.gpus_per_node:
        limits["nvidia.com/gpu"] = str(resources.gpus_per_node)
    return {"requests": limits, "limits": limits}


def _pod(
    name: str,
    words: list[str],
    resources: Manifest,
    secrets: Sequence[str],
    cluster: Cluster,
    grace_seconds: int,
) -> Manifest:
    container = {
        "name": "masklock",
        "image": cluster.image,
        "command": words,
        "workingDir": WORK_FOLDER,
        "env": [_from_secret(variable, cluster) for variable in secrets],
        "resources": resources,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "work", "mountPath": WORK_FOLDER},
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "memory", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "metadata": {"labels": _labels(name)},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": grace_seconds,
            "automountServiceAccountToken": False,
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
            "volumes": [
                {"name": "work", "persistentVolumeClaim": {"claimName": cluster.claim}},
                {"name": "config", "configMap": {"name": name}},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        },
    }


def _from_secret(variable: str, cluster: Cluster) -> Manifest:
    reference = {"name": cluster.secret, "key": variable}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _config_map(name: str, files: dict[str, str], cluster: Cluster) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(name, cluster),
        "data": files,
    }


def _service(name: str, cluster: Cluster) -> Manifest:
    """Gives the first pod a name before it is ready, so that the others find it."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, cluster),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _labels(name),
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def _metadata(name: str, cluster: Cluster) -> Manifest:
    return {"name": name, "namespace": cluster.namespace, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "masklock", "app.kubernetes.io/instance": name}


def _name(run: str) -> str:
    """A run's name as the DNS label that Kubernetes takes.

    Pods add an index to it, and retraining a suffix: 50 characters leave room.
    """
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:50].strip("-")


class _Readable(yaml.SafeDumper):
    """Files in a ConfigMap as blocks of lines, nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _lines_as_block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _lines_as_block)


def _stream(objects: Sequence[Manifest]) -> str:
    return yaml.dump_all(objects, Dumper=_Readable, sort_keys=False, explicit_start=True)
