"""The commands: generate in one process, in processes that it starts, and as a SLURM job; plan."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from models_hf import VOCAB, build, compute
from typer.testing import CliRunner

from pplx_jax import generate_command, plan
from pplx_jax.__main__ import app
from pplx_jax.models.decoder import LayerReport
from pplx_jax.models.errors import ModelError
from pplx_jax.models.registry import PUBLISHED
from pplx_jax.models.sharding import Placement


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Mixtral, with a tokenizer whose words are w0, w1, ..."""
    folder = tmp_path_factory.mktemp("commands")
    found = compute(build("mixtral", folder), folder, batch=1, length=6, new=5)
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return found


def environment(**changes):
    """One device a process, and none of the variables of a launcher that runs these tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    flags = env.get("XLA_FLAGS", "").split()
    env["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return {**env, "JAX_PLATFORMS": "cpu", **changes}


def start(*arguments, **changes):
    return subprocess.Popen(
        [sys.executable, "-m", "pplx_jax", "generate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def ended(process, status=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == status, err
    return out, err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listed(tokens):
    return ",".join(map(str, tokens))


def expected(reference):
    """The continuation up to Mixtral's end of a text, token 2."""
    tokens = reference.continuation[0].tolist()
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


def test_generate_text_in_one_process(reference):
    prompt = " ".join(f"w{token}" for token in reference.tokens[0])
    out, err = ended(start(reference.folder, "--prompt", prompt, "--max-new-tokens", 5))
    # The space between them, too.
    assert out == " ".join([prompt, *(f"w{token}" for token in expected(reference))]) + "\n"
    assert "6 tokens of prompt" in err
    assert "tokens/s" in err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_generate_starts_processes(reference):
    tokens = listed(reference.tokens[0])
    arguments = ("--tokens", tokens, "--mesh", "ep=2", "--max-new-tokens", 5, "--stats")
    out, err = ended(start(reference.folder, *arguments, COLUMNS="200"))
    # gloo talks on standard output.
    assert [int(token) for token in out.splitlines()[-1].split()] == expected(reference)
    assert "dispatch and combine, 5 programs on 2 ranks" in err
    # 10 tokens with two experts each: the prompt's six and four more.
    row = next(line for line in err.splitlines() if line.startswith("│") and "x mean" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["0", "20"]
    assert 10 <= int(cells[2]) <= 20
    assert cells[-2:] == ["0", "0"]
    assert "failed" in err
    assert "messages over" in err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_generate_in_a_slurm_job(reference):
    """The variables that srun sets, by hand; jax.distributed finds its way by them."""
    shared = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    arguments = ("--tokens", listed(reference.tokens[0]), "--mesh", "ep=2", "--max-new-tokens", 5)
    ranks = [
        start(reference.folder, *arguments, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **shared)
        for i in range(2)
    ]
    try:
        (first, _), (second, _) = (ended(rank) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [int(token) for token in first.splitlines()[-1].split()] == expected(reference)
    assert not [line for line in second.splitlines() if line and "Gloo" not in line]


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "500"}).invoke(app, ["generate", *map(str, arguments)])


def test_generate_answers_a_message(reference, tmp_path):
    """--chat is the checkpoint's template around the prompt."""
    pytest.importorskip("transformers")
    folder = tmp_path / "chat"
    shutil.copytree(reference.folder, folder)
    template = (
        "{% for m in messages %}w1 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w3{% endif %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    answer = invoke(folder, "--chat", "--prompt", "w5 w6", "--max-new-tokens", 3)
    assert answer.exit_code == 0, answer.output
    plain = invoke(folder, "--tokens", "1,5,6,3", "--max-new-tokens", 3)
    words = answer.stdout.split()
    assert 0 < len(words) <= 3
    assert words == [f"w{token}" for token in plain.stdout.split()]
    for settings, what in (
        ({}, "has no chat template: give the text as it is"),
        ({"chat_template": "{{ raise_exception('no') }}"}, "chat template failed: .*no.*give the whole text"),
    ):
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        result = invoke(folder, "--chat", "--prompt", "w5")
        assert result.exit_code == 1
        assert re.search(what, result.output), result.output
    assert "--chat needs --prompt" in invoke(folder, "--chat", "--tokens", "1").output


def test_tokenizers_that_need_more(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"")

    def fail(*arguments, **options):
        raise ImportError("\nThis tokenizer requires the SentencePiece library\nbut it was not found")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    result = invoke(tmp_path, "--prompt", "Hello")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert re.search("needs another package .* install it, or give tokens.* SentencePiece", result.output)


def test_tables_say_what_failed():
    seen = generate_command._Seen()
    report = LayerReport(*map(np.asarray, ([3, 1], 4, 0, 0)))
    seen.add([report])
    seen.add([report])
    model = SimpleNamespace(placement=Placement(), config=PUBLISHED["mixtral-8x7b"]())
    (table,) = seen.tables(model)
    assert [column.header for column in table.columns][-2:] == ["dropped", "failed"]
    assert list(table.columns[-1].cells) == ["2"]

    peer = {"sent_bytes": 1, "received_bytes": 2}
    waits = {"mean_wait_seconds": 1e-3, "longest_wait_seconds": 1e-2}
    for seen_of_peer, what in (({**peer, **waits}, "waits for each peer"), (peer, "no waits: on GPUs")):
        stats = {"fabric": "shm", "ranks": [{"exchanges": 1, "peers": [seen_of_peer]}]}
        assert what in generate_command._peer_table(stats).title


@pytest.mark.multiprocess
def test_a_failed_rank_of_a_job_leaves_at_once(tmp_path):
    """One that a launcher started doesn't wait in JAX's exit handlers for those that go on."""
    coordinator = f"127.0.0.1:{free_port()}"
    idle = (
        f"import jax, time; jax.distributed.initialize({coordinator!r}, 2, 0); jax.devices(); time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", idle],
        env=environment(JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        job = ("--coordinator", coordinator, "--num-processes", 2, "--process-id", 1)
        _, err = ended(start(tmp_path, "--tokens", "1", "--mesh", "ep=2", *job), status=1)
        assert "config.json is missing" in err
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_launchers():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a[1-2]"}
    assert generate_command.launched({**slurm, "SLURM_NTASKS": "16"})
    assert not generate_command.launched({**slurm, "SLURM_NTASKS": "1"})
    assert not generate_command.launched({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16"})  # a shell of salloc
    assert generate_command.launched({"JAX_COORDINATOR_ADDRESS": "a:1"})
    assert not generate_command.launched({})


def test_mesh_argument():
    assert generate_command.parse_mesh("dp=2, ep=4") == {"dp": 2, "ep": 4}
    assert generate_command.parse_mesh("") == {}
    for bad in ("ep", "ep=0", "ep=4,ep=2", "ep=-1"):
        with pytest.raises(ValueError, match="mesh must read like ep=4"):
            generate_command.parse_mesh(bad)


def _spoil(change):
    def spoil(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _edit(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


@pytest.mark.parametrize(
    "spoil, arguments, what",
    [
        (_edit(model_type="llama"), [], "'llama'.* is not supported; .*: give a checkpoint of one of these"),
        (_spoil(lambda data: data[:-1000]), [], "is truncated: tensor .*: download the file again"),
        (_spoil(lambda data: data[:8] + b"?" + data[9:]), [], "corrupt header .*: download the file again"),
        (None, ["--mesh", "ep=3"], "ep=3, which doesn't divide the model's 8 experts: choose one of 1, 2, 4"),
        (None, ["--mesh", "ep=2,pp=2"], "axis 'pp'; models know dp, ep and tp: rename or drop it"),
        (None, ["--mesh", "4"], "mesh must read like ep=4"),
        # Said before anything is loaded: the weights are spoiled.
        (
            _spoil(lambda data: b""),
            ["--max-new-tokens", "300"],
            "302 tokens exceed the model's context of 256 .*: shorten the prompt or max_new_tokens",
        ),
        (_spoil(lambda data: b""), ["--tokens", "1,200"], "tokens must be from 0 to 127, got 1 to 200"),
        (None, ["--tokens", "1;2"], "tokens must be numbers such as 1,15,7, got '1;2'"),
        (None, ["--dtype", "int3"], "dtype must be float32, bfloat16 or float16, got 'int3'"),
        # Before loading, too.
        (_spoil(lambda data: b""), ["--seed", str(2**63)], "seed must be an int of at most 64 bits, got"),
        (_spoil(lambda data: b""), ["--top-p", "3"], "top_p must be above 0 and at most 1, got 3.0"),
        (None, ["--fabric", "carrier pigeon", "--mesh", "ep=1"], "'carrier pigeon'.* doctor` shows which"),
    ],
)
def test_bad_input(reference, tmp_path, spoil, arguments, what):
    """One sentence that says what to do, and no trace of where it was found out."""
    folder = tmp_path / "copy"
    shutil.copytree(reference.folder, folder)
    if spoil is not None:
        spoil(folder)
    if "--tokens" not in arguments:
        arguments = [*arguments, "--tokens", "1,2"]
    result = CliRunner(env={"COLUMNS": "500"}).invoke(app, ["generate", str(folder), *arguments])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    assert re.search(what, result.output), result.output
    assert "Traceback" not in result.output


def test_generate_says_what_is_wrong(tmp_path, capsys):
    assert generate_command.run(generate_command.Options(str(tmp_path), tokens=(1,))) == 1
    assert "config.json is missing" in capsys.readouterr().err
    assert generate_command.run(generate_command.Options(str(tmp_path), prompt="Hello")) == 1
    assert "has no tokenizer.json: download it, or give tokens" in capsys.readouterr().err


@pytest.mark.multiprocess
def test_a_failing_process_ends_the_others(tmp_path):
    _, err = ended(start(tmp_path, "--tokens", "1", "--mesh", "ep=2"), status=1)
    assert "config.json is missing" in err


# ---- plan --------------------------------------------------------------------------------------------------


def test_distinct_ranks_against_drawing():
    rng = np.random.default_rng(0)
    for experts, top_k, ranks in ((384, 8, 32), (8, 2, 4), (16, 4, 16), (8, 2, 1)):
        drawn = np.argsort(rng.random((20_000, experts)), axis=1)[:, :top_k] // (experts // ranks)
        mean = np.mean([len(set(row)) for row in drawn[:5000]])
        assert plan.distinct_ranks(experts, top_k, ranks) == pytest.approx(mean, rel=0.02)


def test_plan_against_a_model_that_is_there():
    """Bytes of weights and caches on one device, against those of a real model of the same sizes."""
    import dataclasses

    import jax
    from flax import nnx

    from pplx_jax.models.loading import from_config

    config = dataclasses.replace(
        PUBLISHED["qwen3-30b-a3b"](), num_hidden_layers=1, hidden_size=256, vocab_size=512, num_experts=8
    )
    found = plan.make(config, plan.Cluster(hosts=1, gpus=1, batch=2, context=16), float8=False)
    model = from_config(config)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert sum(found.weights.values()) == pytest.approx(held, rel=2e-3)  # but for norms
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(model.caches(2, 16)))
    assert found.cache == caches
    assert found.wire["dispatch, network"] == 0
    assert found.rows["all"] == 1


def test_plan_of_kimi_k2():
    found = plan.make(PUBLISHED["kimi-k2"](), plan.Cluster(hosts=4), float8=True)
    assert found.experts_per_rank == 12
    assert found.fits
    # 64 heads' scores of 4096 keys, for 8 tokens of each of 128 sequences, as float32 and as bfloat16.
    assert found.prefill_chunk == 8
    assert found.prefill == 8 * 128 * 64 * 4096 * (4 + 2)
    parts = (*found.weights.values(), *found.exchange.values(), found.scratch, found.cache, found.prefill)
    assert found.total == pytest.approx(sum(parts))
    # 12 experts of 60 layers, three matrices of 7168 x 2048 bytes each, and their scales.
    assert found.weights["experts"] == pytest.approx(12 * 60 * 3 * 7168 * 2048 * (1 + 4 / 128**2))
    # (512 + 64) numbers of two bytes in each of 61 layers.
    assert found.cache == 128 * 4096 * 61 * 576 * 2
    row = 7168 + 56 * 4 + math.ceil((8 + 12 * 8) / 16) * 16
    sent = 128 * 60 * found.rows["other_hosts"]
    assert found.wire["dispatch, network"] == pytest.approx(sent * row)
    assert found.wire["combine, network"] == pytest.approx(sent * 7168 * 2)
    assert found.times["network"] == pytest.approx(sent * (row + 7168 * 2) / 50e9 * 1e6)
    assert not plan.make(PUBLISHED["kimi-k2"](), plan.Cluster(hosts=1), float8=True).fits
    slow = plan.make(PUBLISHED["kimi-k2"](), plan.Cluster(hosts=4, network=25.0), float8=True)
    assert slow.bound == "network"


def test_plan_command(tmp_path, capsys):
    for name in PUBLISHED:
        copies = 2 if name.startswith("mixtral") else 1
        plan.run(name, plan.Cluster(hosts=2, batch=16, dp=copies), weights=None, json_output=False)
        printed = capsys.readouterr().out
        assert "Memory of a GPU" in printed
        assert "is bound by" in printed.replace("\n", " ")
    done = subprocess.run(
        [sys.executable, "-m", "pplx_jax", "plan", "kimi-k2", "--hosts", "4", "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["experts_per_rank"] == 12
    for name, cluster, match in (
        ("kimi-k3", {"hosts": 1}, "neither a config.json nor a known model; known are deepseek-r1"),
        ("kimi-k2", {"hosts": 5}, "ep=40, which doesn't divide the model's 384 experts: choose one of"),
        ("kimi-k2", {"hosts": 1, "tp": 3}, "tp=3 x dp=1 doesn't divide 1 x 8 GPUs"),
        ("kimi-k2", {"hosts": 1, "batch": 0}, "batch must be above 0"),
    ):
        with pytest.raises(ModelError, match=match):
            plan.run(name, plan.Cluster(**cluster), weights=None, json_output=False)


def test_plan_of_a_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(transformers.MixtralConfig().to_dict()))
    plan.run(str(tmp_path), plan.Cluster(hosts=1), weights="float8", json_output=True)
    assert json.loads(capsys.readouterr().out)["experts_per_rank"] == 1


def test_plan_of_weights_that_are_not_supported(tmp_path, capsys):
    """Kimi K2 Thinking's INT4 can't be loaded; what the model would take in another dtype can be computed."""
    transformers = pytest.importorskip("transformers")
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    raw = {**transformers.DeepseekV3Config().to_dict(), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for weights in ("float8", "bfloat16"):
        plan.run(str(tmp_path), plan.Cluster(hosts=4), weights=weights, json_output=True)
        assert json.loads(capsys.readouterr().out)["experts_per_rank"] == 8
    with pytest.raises(ModelError, match=r"compressed-tensors .* give --weights float8 or bfloat16$"):
        plan.run(str(tmp_path), plan.Cluster(hosts=4), weights=None, json_output=True)
