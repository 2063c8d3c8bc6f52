"""Architectures that vLLM runs through transformers' own code (GPT-NeoX, so Pythia) work alike.

vLLM rewrites such a model class for the whole process, so this runs in a process of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import save_model
from ranks import run_python
from rollout_rows import moved
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from r2m_ray.core.batch import Prompt, SamplePlan
from r2m_ray.engines.rollout.engine import RolloutEngine
from r2m_ray.engines.weights import WeightDigest, pack_buckets


@pytest.mark.slow
def test_gpt_neox_exports_and_updates(tmp_path: Path) -> None:
    save_model(tmp_path, GPTNeoXForCausalLM)
    printed, _ = run_python(__file__, tmp_path, timeout_s=300)
    report = json.loads(printed.splitlines()[-1])
    assert report["rows"] == 12
    assert report["hidden_error"] < 1e-4
    assert report["logp_error"] < 1e-4
    assert report["updated_hidden_error"] < 1e-4
    assert report["updated_greedy_agreement"] == 1.0


def measured(model_dir: str) -> dict[str, float]:
    """Largest differences from transformers' own reading, before and after a weight update."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    engine = RolloutEngine(
        model_dir=model_dir,
        dtype="float32",
        seed=0,
        max_model_len=96,
        export_hidden=True,
        engine_args={"enforce_eager": True, "block_size": 32},
    )
    prompts = tuple(
        Prompt(index=i, text=" ".join(f"w{20 * i + j}" for j in range(5 + 15 * i))) for i in range(4)
    )

    def sample(temperature: float) -> tuple[int, float, float, float]:
        plan = SamplePlan(
            prompts=prompts, group_size=3, step=1, seed=0, temperature=temperature, max_new_tokens=16
        )
        ((rows, hidden),) = engine.sample([plan])
        hidden_errors, logp_errors, greedy = [], [], []
        for n in range(rows.layout.rows):
            where = rows.layout.slice_of(n)
            with torch.no_grad():
                # The class's own call is vLLM's by now.
                expected = model.gpt_neox.forward(rows.input_T[where][None]).last_hidden_state[0]
                logits = model.get_output_embeddings()(expected)
            action, labels = rows.action_T[where], rows.label_T[where]
            logp = (logits / (temperature or 1.0)).log_softmax(-1).gather(1, labels[:, None])[:, 0]
            hidden_errors.append((hidden.hidden_TP[where] - expected).abs().max())
            logp_errors.append((rows.rollout_logp_T[where] - logp)[action].abs().max())
            greedy.append((logits.argmax(-1) == labels)[action].float().mean())
        return rows.layout.rows, float(max(hidden_errors)), float(max(logp_errors)), float(min(greedy))

    rows, hidden_error, logp_error, _ = sample(0.7)
    digest = WeightDigest()
    moved(model, seed=1)
    engine.begin_weight_update()
    for bucket in pack_buckets(model.named_parameters(), 50_000):
        digest.update(bucket)
        engine.load_bucket(bucket)
    engine.finish_weight_update(version=1, digest=digest.hexdigest())
    _, updated_error, _, agreement = sample(0.0)
    engine.close()
    return {
        "rows": rows,
        "hidden_error": hidden_error,
        "logp_error": logp_error,
        "updated_hidden_error": updated_error,
        "updated_greedy_agreement": agreement,
    }


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1])))
