"""Files of docs/run/clusters.md that no cluster here can run: by schema and with stand-ins.

`benchmarks/clusters.py` runs the ones for SLURM, Open MPI and Ray on these engines.
"""

import copy
import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from shardkit.cli._main import parser
from shardkit.processes._cluster import check_environment, initialize_arguments

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "run" / "clusters.md").read_text()
SCHEMA = json.loads((ROOT / "tests" / "data" / "jobset_schema.json").read_text())
KINDS = {"object": dict, "array": list, "string": str, "integer": int}


def block(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(r"^```text\n(.*?)^```$", section, re.M | re.S)
    assert found
    return found[1]


def faults(value, schema, path=""):
    """What JSON Schema says of a value, by path; a field that is not listed is a fault."""
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{path}: {value!r}"]
    kind = KINDS[schema["type"]]
    if not isinstance(value, kind) or isinstance(value, bool):
        return [f"{path}: {type(value).__name__}"]
    if isinstance(value, str):
        return [] if re.fullmatch(schema.get("pattern", ".*"), value) else [f"{path}: {value!r}"]
    if isinstance(value, list):
        below = ((f"{path}[{i}]", x, schema["items"]) for i, x in enumerate(value))
    elif isinstance(value, dict):
        missing = [f"{path}.{name} is missing" for name in schema.get("required", ())]
        missing = [text for text in missing if text.split()[0].rpartition(".")[2] not in value]
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        unknown = [f"{path}.{name}" for name in value if name not in known and other is None]
        if missing or unknown:
            return missing + unknown
        below = ((f"{path}.{name}", x, known.get(name, other)) for name, x in value.items())
    else:
        return []
    return [fault for where, x, inner in below for fault in faults(x, inner, where)]


def pods(document):
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]


def test_the_jobset_follows_its_schema_and_its_own_numbers():
    document = yaml.safe_load(block("Kubernetes"))
    assert faults(document, SCHEMA) == []
    job, pod = pods(document)
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    parser().parse_args(container["command"][1:])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounts)
    assert any(word.startswith(f"train.out={mounts['runs']}/") for word in container["command"])


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda job, pod: job.pop("template"), ".template is missing"),
        (lambda job, pod: job.update(paralelism=4), ".paralelism"),
        (lambda job, pod: job.update(parallelism="4"), ".parallelism: str"),
        (lambda job, pod: pod.update(restartPolicy="Always"), ".restartPolicy: 'Always'"),
        (lambda job, pod: pod["containers"][0].update(name="Train_1"), ".name: 'Train_1'"),
        (lambda job, pod: pod["nodeSelector"].update(topology=2), ".topology: int"),
    ],
)
def test_the_schema_finds_what_kubernetes_would_refuse(change, fault):
    document = copy.deepcopy(yaml.safe_load(block("Kubernetes")))
    change(*pods(document))
    (found,) = faults(document, SCHEMA)
    assert found.endswith(fault)


def stand_in(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def run(folder, script):
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "-c", script]
    return subprocess.run(
        command,
        cwd=folder,
        env={"PATH": path, "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("hosts", ["n:0:10.0.0.1,n:1:10.0.0.2,n:2:10.0.0.3", "10.0.0.1,h2,h3"])
def test_the_script_of_a_tpu_pod_gives_what_the_metadata_says(hosts, tmp_path):
    answers = f'case "$4" in */worker-network-endpoints) echo -n "{hosts}";; '
    stand_in(
        tmp_path, "bin/curl", f"{answers} */agent-worker-number) echo -n 2;; *) exit 22;; esac"
    )
    stand_in(tmp_path, ".venv/bin/shardkit", 'env; echo "WORDS=$*"')
    done = run(tmp_path, block("TPU pods"))
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    check_environment(environment)
    assert environment["JAX_COORDINATOR_ADDRESS"] == "10.0.0.1:8476"
    told = initialize_arguments(environment)
    assert (told["num_processes"], told["process_id"]) == (3, 2)
    parser().parse_args(environment["WORDS"].split())


@pytest.mark.parametrize(("code", "asked"), [(75, "requeue 7\n"), (0, ""), (2, "")])
def test_the_script_for_slurm_asks_for_a_stopped_job_again(code, asked, tmp_path):
    stand_in(tmp_path, "bin/srun", f"exit {code}")
    stand_in(tmp_path, "bin/scontrol", 'echo "$@"')
    done = run(tmp_path, block("SLURM"))
    assert (done.returncode, done.stdout) == (code, asked)


def test_the_program_for_ray_is_python():
    compile(block("Ray"), "ray_train.py", "exec")
