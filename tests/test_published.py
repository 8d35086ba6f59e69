"""Checkpoints in the published formats: read as they are, computed as published, or refused in one line."""

from __future__ import annotations

import json
import math

import pytest
import torch

import textdiffusion as td
from published_checkpoints import TOKENS, bd3lm, ddlm, ddlm_outputs, dit, dit_weights, mdlm, sedd
from textdiffusion.commands.cli import main
from textdiffusion.mathematics.schedules import geometric
from textdiffusion.networks.dit import DiT, DiTConfig
from textdiffusion.process import State

MASK = TOKENS
X = torch.tensor([[3, MASK, 7, MASK, 1, 1, MASK, 12, MASK], [MASK] * 8 + [4]])
ALL = torch.ones_like(X, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "training"])
def test_sedd_gives_the_published_scores(tmp_path, kind):
    weights = sedd(tmp_path / "model", kind)
    process = td.load(tmp_path / "model").process
    t = torch.tensor([0.3, 0.95], dtype=torch.float64)
    sigma = -torch.log1p(-t).float()
    with torch.no_grad():
        net = dit(weights, X, sigma)
        ours = process.network(X, t)
        assert torch.allclose(ours, net[..., :MASK], atol=1e-5)
        # As published: scaled by sigma, 0 at the symbol itself.
        published = net - torch.log(torch.expm1(sigma))[:, None, None] - math.log(net.shape[-1] - 1)
        published = published.scatter(-1, X.unsqueeze(-1), 0.0)
        ratios = process.log_ratios(ours.flatten(0, 1), X.flatten(), t.repeat_interleave(X.shape[1])).view(2, 9, -1)
    hidden = X == MASK
    assert torch.allclose(ratios[hidden], published[hidden], atol=1e-5)


def test_mdlm_gives_the_published_law_of_hidden_tokens(tmp_path):
    weights = mdlm(tmp_path / "model")
    process = td.load(tmp_path / "model").process
    with torch.no_grad():
        net = dit(weights, X, torch.zeros(2))
        assert torch.allclose(process.network(X), net[..., :MASK], atol=1e-5)
        net[..., MASK] = -torch.inf
        law = process.predict(State(X, torch.ones(2))).log_p
    hidden = X == MASK
    assert torch.allclose(law[hidden], net.log_softmax(-1)[hidden][:, :MASK], atol=1e-5)
    assert (law[~hidden].argmax(-1) == X[~hidden]).all()


@pytest.mark.parametrize("adaln", [True, False])
def test_bd3lm_sees_its_block_and_the_clean_ones_before(tmp_path, adaln):
    weights = bd3lm(tmp_path / "model", adaln)
    process = td.load(tmp_path / "model").process
    clean = torch.randint(0, TOKENS, X.shape)
    both, n = torch.cat((X, clean), 1), X.shape[1]
    seen = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for i in range(2 * n):
        for j in range(2 * n):
            a, b = i % n // 4, j % n // 4
            if i < n:
                seen[i, j] = a == b if j < n else b < a
            else:
                seen[i, j] = j >= n and b <= a
    with torch.no_grad():
        sigma = torch.zeros(2) if adaln else None
        net = dit(weights, both, sigma, places=[*range(n)] * 2, seen=seen)[:, :n, :MASK]
        ours = process.network(both, positions=torch.cat((ALL, ~ALL), 1), halves=True).view(net.shape)
    assert torch.allclose(ours, net, atol=1e-5)


@pytest.mark.parametrize(("bias", "pth"), [(True, False), (False, False), (False, True)])
def test_ddlm_gives_the_published_ratios(tmp_path, bias, pth):
    weights = ddlm(tmp_path / "model", bias, pth)
    model = td.load(tmp_path / "model" / ("best_model.pth" if pth else ""))
    x = torch.randint(0, 106, (2, 9))
    t = torch.tensor([0.4, 0.9], dtype=torch.float64)
    sigma = (-geometric(1e-4, 20.0).alpha(t).log()).clamp(min=1e-4).float()
    with torch.no_grad():
        ours = model.process.network(x, t).flatten(0, 1)
        ratios = model.process.log_ratios(ours, x.flatten(), t.repeat_interleave(9)).view(2, 9, -1)
        assert torch.allclose(ratios, ddlm_outputs(weights, x, sigma), atol=1e-5)
    assert (
        model.tokenizer.decode(model.tokenizer.encode("It was, \u201cwell\u201d\n5_o"))
        == "It was, \u201cwell\u201d\n5_o"
    )
    assert model.tokenizer.encode("09azAZ!~ \u2026") == [2, 11, 12, 37, 38, 63, 64, 95, 96, 105]


@pytest.mark.parametrize(
    ("width", "heads", "depth", "numbers"), [(768, 12, 12, 169_627_218), (1024, 16, 24, 424_477_010)]
)
def test_the_published_sizes_have_the_published_numbers(width, heads, depth, numbers):
    with torch.device("meta"):
        network = DiT(DiTConfig(50258, 50257, 1024, depth, width, heads))
    assert sum(p.numel() for p in network.parameters()) == numbers


@pytest.mark.parametrize(
    ("make", "family"), [(sedd, "score_entropy"), (mdlm, "masked"), (bd3lm, "block"), (ddlm, "score_entropy")]
)
def test_a_converted_run_is_a_run(tmp_path, make, family, capsys, monkeypatch):
    make(tmp_path / "model")
    run = tmp_path / "run"
    assert main(["convert", str(tmp_path / "model"), str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == family
    one, two = td.load(tmp_path / "model"), td.load(run)
    for name, x in one.process.network.state_dict().items():
        assert torch.equal(x, two.process.network.state_dict()[name]), name
    assert main(["sample", str(run), "-n", "2", "--length", "8", "--calls", "4", "--seed", "3", "--json"]) == 0
    first = capsys.readouterr().out
    assert (
        main(["sample", str(tmp_path / "model"), "-n", "2", "--length", "8", "--calls", "4", "--seed", "3", "--json"])
        == 0
    )
    assert capsys.readouterr().out == first
    assert main(["eval", str(run)]) == 2
    assert "name one with --data" in capsys.readouterr().err
    if make is ddlm:
        (tmp_path / "text.txt").write_text("It was a bright cold day. " * 40)
        assert (
            main(
                [
                    "eval",
                    str(run),
                    "--data",
                    str(tmp_path / "text.txt"),
                    "--samples",
                    "2",
                    "--eval-tokens",
                    "50",
                    "--json",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["kind"] == "upper"


def test_a_network_told_of_noise_reads_the_level_of_given_tokens_from_the_row():
    network = DiT(DiTConfig(8, 8, 6, 1, 16, 2, 8, "geometric", 1e-4, 20.0)).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    x, t = torch.randint(0, 8, (2, 6)), torch.tensor([0.3, 0.8])
    some = t.unsqueeze(-1).expand(2, 6).clone()
    some[:, 2:4] = 0.0
    assert torch.equal(network(x, t), network(x, some))
    assert not torch.allclose(network(x, t), network(x, t.flip(0)))
    with pytest.raises(td.UserError, match="at most 6 tokens"):
        network(torch.zeros(1, 7, dtype=torch.long), torch.ones(1))


# -- what is refused ----------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without(folder, name):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def changed(folder, **more):
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | more))


class Shell:
    """What a malicious file would run when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def pickled(folder, body):
    """Weights as torch.save leaves them, or bytes, in the place of the safetensors."""
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    file.write_bytes(body) if isinstance(body, bytes) else torch.save(body, file)


FAULTS = {
    "cut off": lambda f: cut(f / "model.safetensors"),
    "lacks blocks.1.mlp.0.bias": lambda f: without(f, "backbone.blocks.1.mlp.0.bias"),
    "holds no weights: one of": lambda f: (f / "model.safetensors").unlink(),
    "no config beside it": lambda f: (f / "config.json").write_text("{}"),
    "without time conditioning": lambda f: changed(f, time_conditioning=True),
    "and the tokenizer has 20": lambda f: pickled(f, {f"backbone.{k}": v for k, v in dit_weights(30).items()}),
    "some other model": lambda f: pickled(f, {"lstm.weight": torch.zeros(2)}),
    "holds more than tensors": lambda f: pickled(f, {"model": Shell()}),
    "is damaged or cut off": lambda f: pickled(f, b"PK\3\4nonsense"),
}


@pytest.mark.parametrize("line", FAULTS)
def test_a_wrong_file_gets_one_line(tmp_path, capsys, line):
    mdlm(tmp_path / "model")
    FAULTS[line](tmp_path / "model")
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "run")]) == 2
    out = capsys.readouterr()
    assert line in out.err and out.err.count("\n") == 1 and "unpickled\n" not in out.out, out.err
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_is_said_before_torch_is_asked(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "run")]) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("x")
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "full")]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_averaged_weights_of_another_network_are_refused(tmp_path, capsys):
    sedd(tmp_path / "model", "training")
    file = tmp_path / "model/checkpoints-meta/checkpoint.pth"
    body = torch.load(file, weights_only=True)
    body["ema"]["shadow_params"].pop()
    torch.save(body, file)
    assert main(["convert", str(file), str(tmp_path / "run")]) == 2
    assert "averaged weights" in capsys.readouterr().err
