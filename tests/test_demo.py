"""The demo, small: it trains, judges itself, and reports a process that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pplx_jax import demo
from pplx_jax.demo_rank import DemoConfig, draw_batch, load_corpus, unigram_entropy

SMALL: dict[str, Any] = {
    "batch": 8,
    "window": 64,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "intermediate": 48,
    "num_experts": 4,
    "learning_rate": 1e-2,
    "sample": 12,
    "proof_steps": 4,
}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_demo_trains_and_proves_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(processes=2, steps=300, out=tmp_path, timeout=280, **SMALL)
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1].startswith("demo: OK")
    assert "losses differ by at most" in printed
    record = json.loads((tmp_path / "losses.json").read_text())
    assert record["final"] < 0.8 * record["unigram"]
    assert len(record["history"]) == 300
    sharded = [entry["loss"] for entry in record["history"][:4]]
    np.testing.assert_allclose(record["dense"], sharded, atol=1e-4)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sample.txt").read_text().startswith("def ")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_too_few_steps_are_a_plain_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not demo.run(processes=1, steps=1, out=tmp_path, timeout=200, **{**SMALL, "proof_steps": 0})
    assert "demo: FAILED: the validation loss" in capsys.readouterr().out


@pytest.mark.multiprocess
def test_a_failing_process_ends_the_demo_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not demo.run(processes=2, steps=1, out=tmp_path, fabric="nonsense", timeout=200, **SMALL)
    printed = capsys.readouterr().out
    assert "nonsense" in printed
    assert printed.strip().splitlines()[-1] == "demo: FAILED: a process failed"


@pytest.mark.multiprocess
def test_the_total_timeout_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not demo.run(processes=2, steps=1, out=tmp_path, timeout=0.5, **SMALL)
    assert "longer than the total timeout" in capsys.readouterr().out


def test_corpus_and_batches() -> None:
    train, validation = load_corpus()
    assert train.dtype == validation.dtype == np.uint8
    assert 2 < unigram_entropy(validation) < np.log(256)
    assert unigram_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(np.log(256))
    config = DemoConfig()
    batch = draw_batch(train, config, 0, 3)
    assert batch.shape == (config.batch, config.window + 1)
    np.testing.assert_array_equal(batch, draw_batch(train, config, 0, 3))
    assert (batch != draw_batch(train, config, 0, 4)).any()


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (ValueError, "batch", {"batch": 15}),
        (ValueError, "processes", {"processes": 0}),
        (ValueError, "steps", {"steps": 0}),
        (TypeError, "steps", {"steps": 1.5}),
    ],
)
def test_bad_arguments_are_named(
    error: type[Exception], match: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        demo.run(out=tmp_path, **changes)
