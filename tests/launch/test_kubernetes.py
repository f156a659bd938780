"""The objects for Kubernetes, held against the schemas that the API server itself publishes."""

import warnings

import pytest
import yaml

from launch import kubernetes
from launch.kubernetes import Cluster
from launch.schedule import Schedule

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import kubernetes_validate

CLUSTER = Cluster("registry.example/masklock:1", claim="training", namespace="ml")
VERSION = "1.31"


@pytest.fixture
def objects(job):
    def objects(secrets=(), **resources):
        spec = job(secrets=secrets, **resources)
        text = kubernetes.render(spec, "name: x\nseed: 1\n", "distributed_type: NO\n", CLUSTER)
        return {each["kind"]: each for each in yaml.safe_load_all(text)}

    return objects


@pytest.fixture
def cron_job():
    text = kubernetes.render_retraining(
        "nightly", "a: 1\n", Schedule("6h"), CLUSTER, ("WANDB_API_KEY",)
    )
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_object_is_strictly_what_the_api_takes(objects, nodes):
    found = objects(("HF_TOKEN",), nodes=nodes, gpus_per_node=8, time_limit="01:00:00")
    assert found.keys() == {"ConfigMap", "Job"} | ({"Service"} if nodes > 1 else set())
    for each in found.values():
        kubernetes_validate.validate(each, VERSION, strict=True)


def test_the_schemas_would_find_a_misspelt_key(objects):
    job = objects()["Job"]
    job["spec"]["template"]["spec"]["restartpolicy"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_retraining_is_a_cron_job_that_never_overlaps(cron_job):
    for each in cron_job.values():
        kubernetes_validate.validate(each, VERSION, strict=True)
    spec = cron_job["CronJob"]["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("0 */6 * * *", "Etc/UTC")
    assert spec["concurrencyPolicy"] == "Forbid"


def test_pods_of_several_nodes_find_the_first_by_name(objects):
    found = objects(nodes=2, gpus_per_node=8)
    spec = found["Job"]["spec"]
    pod = spec["template"]["spec"]
    words = pod["containers"][0]["command"]
    assert spec["completions"] == spec["parallelism"] == 2
    assert words[words.index("--main_process_ip") + 1] == "intents-2-0.intents-2"
    assert words[words.index("--machine_rank") + 1] == "$(JOB_COMPLETION_INDEX)"
    assert pod["subdomain"] == found["Service"]["metadata"]["name"] == "intents-2"
    assert found["Service"]["spec"]["selector"] == spec["template"]["metadata"]["labels"]


def test_the_resources_are_requests_and_limits(objects):
    pod = objects(gpus_per_node=8, memory_per_node="500G")["Job"]["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "32", "memory": "500Gi", "nvidia.com/gpu": "8"}


def test_secrets_are_references_only(objects, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    found = objects(("HF_TOKEN",))
    environment = found["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    reference = {"secretKeyRef": {"name": "masklock", "key": "HF_TOKEN"}}
    assert {"name": "HF_TOKEN", "valueFrom": reference} in environment
    assert "canary" not in yaml.safe_dump_all(found.values())


def test_files_in_the_config_map_are_readable_blocks(job):
    text = kubernetes.render(job(), "name: x\nseed: 1\n", "a: 1\nb: 2\n", CLUSTER)
    assert "  config.yaml: |\n    name: x\n    seed: 1\n" in text


def test_a_drained_node_is_no_failure_and_bad_input_is_not_tried_again(objects):
    drained, bad_input = objects()["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert drained["action"] == "Ignore"
    assert drained["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (bad_input["action"], bad_input["onExitCodes"]["values"]) == ("FailJob", [2])
