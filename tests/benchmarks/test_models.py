"""The benchmark runs, its references are what they say, and memory stays what RESULTS.md says."""

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.scripts import BENCHMARKS, imported

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")


def run(code: str, *flags: str) -> str:
    """What `code` prints in a process of its own, the benchmark imported as `models`."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import json, torch, models\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def references():
    return imported("references")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prints_one_row_per_model_and_batch(dtype):
    code = "models.SCENES = {'three bags': [40, 20, 5]}; models.TURN_SECONDS = 0.001; models.main()"
    out = run(code, "--sizes", "50", "--repeats", "1", "--threads", "1", "--dtype", dtype)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    cells = {row[0]: row[1:] for row in rows}
    assert "### One bag of 50 instances" in out
    assert "### three bags: 65 instances, the longest bag has 40" in out
    counts = {"LiteMIL": 559_490, "ABMIL": 788_739, "ABMIL_Multihead": 657_668, "TransMIL": 2_672_146}
    counts |= {"meanPool": 296_066, "maxPool": 296_066, "TransMIL as published": 2_672_146}
    counts |= {"LiteMIL by nn.MultiheadAttention": 559_490, "LiteMIL, padded": 559_490}
    for name, count in counts.items():
        assert cells[name][0] == f"{count:,}", name
    for name in ("LiteMIL", "LiteMIL.forward_bags"):
        assert (cells[name][2], cells[name][4]) == ("1.00", "1.00")
    assert cells["LiteMIL.forward_blocks"][4:] == ["", ""]
    # Two per multiplication and addition: the projection of 50 instances, 1024 to 256.
    assert cells["input projection alone"][1] == f"{2 * 50 * 1024 * 256 / 1e9:.2f}"


def test_the_plain_form_is_the_same_function(references):
    torch.manual_seed(0)
    plain = references.PlainLiteMIL(20, 3).double().eval()
    model = models_of(plain)
    x = torch.randn(2, 9, 20, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[9], [4]])
    torch.testing.assert_close(plain(x, mask), model(x, mask)[0], rtol=1e-12, atol=1e-12)


def models_of(plain):
    from MILS import build_mil

    model = build_mil("LiteMIL", input_dim=20, num_classes=3).double().eval()
    stream = model.stream
    for ours, theirs in (
        (stream.project, plain.project),
        (stream.attn, plain.attn),
        (model.classifier, plain.classifier),
    ):
        ours.load_state_dict(theirs.state_dict())
    stream.query.data = plain.query.data
    return model


def test_the_published_transmil_has_the_shapes_of_ours(references):
    from MILS import build_mil

    def shapes(model):
        return sorted(tuple(parameter.shape) for parameter in model.parameters())

    published = references.PublishedTransMIL(1024, 2)
    assert shapes(published) == shapes(build_mil("TransMIL", input_dim=1024, num_classes=2))
    assert published(torch.randn(2, 30, 1024)).shape == (2, 2)


@LINUX
@pytest.mark.slow
def test_memory_is_what_it_was_measured_to_be():
    """Megabytes beyond input and weights, of which a tensor of 50,000 x 256 in single precision is 51."""
    code = """
setting = models.Setting("cpu", torch.float32, torch.get_num_threads(), 1)
def peak(group, name, which, lengths):
    return models.in_own_process(lambda: models.measure_memory(setting, group[name], which, lengths)) / 1e6
def stream():
    model, block = models.mil("LiteMIL"), torch.randn(5000, 1024)
    model.forward_blocks(block for _ in range(2))
    return models.peak_of(lambda: model.forward_blocks(block for _ in range(40))) / 1e6
found = {
    "step": peak(models.MODELS, "LiteMIL", "step", [50_000]),
    "plain step": peak(models.MODELS, "LiteMIL by nn.MultiheadAttention", "step", [50_000]),
    "stream": models.in_own_process(stream),
    "ragged forward": peak(models.BATCHES, "LiteMIL.forward_bags", "forward", models.RAGGED),
    "ragged step": peak(models.BATCHES, "LiteMIL.forward_bags", "step", models.RAGGED),
}
print(json.dumps(found))"""
    found = json.loads(run(code))
    limits = {"step": 90, "stream": 48, "ragged forward": 32, "ragged step": 220}
    assert {name: found[name] for name, limit in limits.items() if found[name] > limit} == {}
    assert found["plain step"] > 4 * found["step"], "the measure does not see what it should"
