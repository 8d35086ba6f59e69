"""Runs in lm-evaluation-harness: likelihoods of continuations against enumeration, and a task on this disk."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from small_runs import small_run

pytest.importorskip("lm_eval", reason="the extra eval is not installed: `make slow` does it")

import lm_eval
from lm_eval.tasks import TaskManager

import textdiffusion as td
from textdiffusion.families import family
from textdiffusion.harness import Harness, continuation_nats
from textdiffusion.mathematics.worlds import random_table

pytestmark = pytest.mark.slow  # not for what they take, but for the sixty packages that they need


def world():
    return random_table(vocabulary=3, length=4, seed=5)


def oracle(name, **fields):
    """A family that knows the law of the world."""
    cls = family(name)
    blank = cls(lambda x, **how: x, cls.Config(**fields), 3)
    return blank.over(blank.ideal(world().context))


def conditional(x, first):
    """-log p(x_first .. | what stands before)."""
    table = world()
    before = torch.tensor([[*x[:first].tolist(), *rest] for rest in itertools.product(range(3), repeat=4 - first)])
    return float(table.log_prob(before).exp().sum().log() - table.log_prob(x.unsqueeze(0)))


@pytest.mark.parametrize("name", ["masked", "sparse_distribution", "score_entropy", "block", "autoregressive"])
def test_with_the_oracle_the_bound_is_the_conditional_likelihood(name):
    process = oracle(name, **({"block_length": 2} if name == "block" else {}))
    draws = 1 if name == "autoregressive" else 1500
    for x, first in ((torch.tensor([2, 0, 1, 1]), 1), (torch.tensor([0, 2, 2, 1]), 0)):
        nats, _ = continuation_nats(process, x, first, draws)
        assert nats == pytest.approx(conditional(x, first), abs=1e-9 if draws == 1 else 0.12)


def test_what_is_estimated_is_the_sum_over_all_hidden_sets():
    torch.manual_seed(3)
    table = torch.randn(81 * 4, 4, 3)
    from textdiffusion.families.masked import Masked, MaskedConfig
    from textdiffusion.process import State, as_network

    place = 4 ** torch.arange(4)
    process = Masked(as_network(lambda x, t: table[(x * place).sum(-1) % 324]), MaskedConfig(), 3)
    x, first = torch.tensor([2, 0, 1, 1]), 1
    exact = 0.0
    for n in range(1, 4):
        sets = list(itertools.combinations(range(1, 4), n))
        for hidden in sets:
            chosen = torch.zeros(1, 4, dtype=torch.bool)
            chosen[0, list(hidden)] = True
            law = process.predict(State(x.unsqueeze(0).masked_fill(chosen, 3), torch.ones(1)), chosen).log_p
            exact -= float(law.gather(-1, x[chosen[0]].unsqueeze(-1)).sum()) / n / len(sets)
    assert continuation_nats(process, x, first, 3000)[0] == pytest.approx(exact, abs=0.08)


def test_greedy_says_whether_the_likeliest_text_is_this_one():
    process = oracle("autoregressive")
    x = torch.tensor([1, 0, 0, 0])
    for i in range(1, 4):
        x[i] = min(range(3), key=lambda v: conditional_of(x, i, v))
    assert continuation_nats(process, x, 1, 1)[1]
    x[3] = (x[3] + 1) % 3
    assert not continuation_nats(process, x, 1, 1)[1]


def conditional_of(x, i, v):
    """-log p(x_0 .. x_{i-1}, v)."""
    rest = itertools.product(range(3), repeat=3 - i)
    return -float(world().log_prob(torch.tensor([[*x[:i].tolist(), v, *more] for more in rest])).exp().sum())


@pytest.mark.parametrize("name", ["uniform", "analog_bits"])
def test_a_family_whose_noise_hides_nothing_is_refused(tmp_path, name):
    model = small_run(tmp_path / "run", name, 16).model
    with pytest.raises(td.UserError, match="no likelihood given a context"):
        continuation_nats(model.process, torch.tensor([1, 2, 3]), 1, 2)


def test_a_task_on_this_disk_runs_through_the_harness(tmp_path):
    run = tmp_path / "run"
    small_run(run, "masked", 24)
    rows = [{"q": "It was a ", "choices": ["bright", "cold"], "a": 0}, {"q": "and ", "choices": ["the", "day"], "a": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/rows.jsonl}}\ntest_split: train\n"
        "doc_to_text: '{{q}}'\n"
    )
    (tmp_path / "choose.yaml").write_text(
        f"task: choose\n{common}output_type: multiple_choice\ndoc_to_choice: '{{{{choices}}}}'\ndoc_to_target: a\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: write\n{common}output_type: generate_until\ndoc_to_target: '{{{{choices[a]}}}}'\n"
        "generation_kwargs: {until: ['!'], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=Harness(str(run), draws=4), tasks=["choose", "write"], task_manager=tasks, bootstrap_iters=0
    )
    samples = found["samples"]["choose"]
    assert len(samples) == 2 and found["results"]["choose"]["acc,none"] in (0.0, 0.5, 1.0)
    # What the harness was told is what the library says.
    model = td.load(run)
    ids = torch.tensor(model.tokenizer.encode("It was a bright"))  # the harness cuts before the space
    told = next(s for s in samples if s["doc"]["q"] == "It was a ")["filtered_resps"][0][0]
    assert float(told) == pytest.approx(-continuation_nats(model.process, ids, 8, 4)[0], rel=1e-6)
    texts = [s["resps"][0][0] for s in found["samples"]["write"]]
    assert all(len(text) <= 6 and "!" not in text for text in texts)


def test_a_rolled_text_costs_what_eval_says(tmp_path):
    model = small_run(tmp_path / "run", "autoregressive", 16).model
    harness = Harness(model, draws=1)
    text = "It was a bright cold day in April"

    class Request:
        args = (text,)

    nats = -harness.loglikelihood_rolling([Request])[0]
    assert nats / len(text) / math.log(2) == pytest.approx(model.score(text), rel=1e-9)
    assert math.isclose(nats, len(text) * math.log(model.tokenizer.vocabulary), rel_tol=1e-5)  # untrained: uniform
