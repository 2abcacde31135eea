"""Runs lm-eval in a process of its own, which knows no network: MODEL TASKS RESULTS."""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager


def evaluate(model, tasks):
    """Both tasks in fp32 on the CPU; the totals, and each document's answers."""
    measured = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=["heldout", "next_words"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in measured["samples"].items()
    }
    return {"results": measured["results"], "answers": answers}


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(evaluate(sys.argv[1], sys.argv[2])))
