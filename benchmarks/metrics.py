"""Compare metrics of two folders with torch-fidelity: python -m benchmarks.metrics A B --help

Both use the same images, Inception weights and threads, and no cache. The values come from one call of each; the
times from calls that take turns, each in a fresh process, including the start of Python.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from benchmarks.machine import describe
from dnnlib.files import atomic_write
from metrics.features import DETECTORS
from torch_utils.command import command

BATCH = 64
WEIGHTS = DETECTORS["inception"].weights.name
PAIRS = {  # our value -> torch-fidelity's
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is_mean": "inception_score_mean",
    "pr_precision": "precision",
    "pr_recall": "recall",
}


class Untrained(FeatureExtractorInceptionV3):
    """Inception with random weights that keep its features apart; its speed does not depend on them."""

    def load_state_dict(self, state):
        rng = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, generator=rng)
        nn.init.normal_(self.fc.weight, std=2, generator=rng)
        nn.init.normal_(self.fc.bias, generator=rng)


def random_weights() -> dict[str, torch.Tensor]:
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Untrained("inception", ["2048"], feature_extractor_weights_path=nothing).state_dict()


def theirs(a: str, b: str, weights: str, everything: bool) -> dict:
    count = min(sum(1 for path in Path(folder).rglob("*") if path.is_file()) for folder in (a, b))
    return calculate_metrics(
        input1=a,
        input2=b,
        fid=True,
        isc=everything,
        kid=everything,
        prc=everything,
        kid_subset_size=min(1000, count),
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(Path(weights) / WEIGHTS),
        samples_find_deep=True,
        batch_size=BATCH,
        cuda=torch.cuda.is_available(),
        cache=False,
        verbose=False,
    )


def ours(a: str, b: str, weights: str, everything: bool) -> dict:
    """Call calc_metrics.py with an empty cache; return its values by kind of metric."""
    names = "fid50k_full,kid50k_full,is50k,pr50k3_full" if everything else "fid50k_full"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "calc_metrics.py", f"--images={a}", f"--data={b}", f"--metrics={names}"]
        command += [f"--weights={weights}", f"--outdir={folder}/out", f"--batch={BATCH}"]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"CREPS_CACHE": f"{folder}/cache"})
        records = [json.loads(path.read_text()) for path in Path(folder, "out").glob("metric-*.jsonl")]
    figures = {name.split("@")[0]: value for record in records for name, value in record["results"].items()}
    found = {}
    for name, value in figures.items():
        family = "".join(letter for letter in name.split("_")[0] if letter.isalpha()).removesuffix("k")
        ending = name.removesuffix("_full").rsplit("_", 1)[-1]
        found[f"{family}_{ending}" if ending in ("mean", "std", "precision", "recall") else family] = value
    return found


@click.command()
@click.argument("a", type=click.Path(exists=True, file_okay=False))
@click.argument("b", type=click.Path(exists=True, file_okay=False))
@click.option("--weights", help="Folder of Inception's weights.  [default: random weights]")
@click.option("--rounds", type=click.IntRange(0), default=3, show_default=True, help="0: the figures alone.")
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results/metrics.json", show_default=True)
@click.option("--fidelity", is_flag=True, hidden=True)
@click.option("--everything", is_flag=True, hidden=True)
@command()
def main(a, b, weights, rounds, out, fidelity, everything):
    """Measure folder A against folder B with both, and time their FID; write JSON."""
    if fidelity:
        click.echo(json.dumps(theirs(a, b, weights, everything)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if weights is None:
            weights = folder
            torch.save(random_weights(), Path(folder) / WEIGHTS)

        def fresh(everything: bool) -> dict:
            command = [sys.executable, "-m", "benchmarks.metrics", a, b, "--weights", weights, "--fidelity"]
            command += ["--everything"] * everything
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            return json.loads(answer.splitlines()[-1])

        mine, reference = ours(a, b, weights, True), fresh(True)
        figures = {name: [mine[name], reference[other]] for name, other in PAIRS.items()}
        click.echo(json.dumps(figures, indent=1))
        seconds: dict[str, list[float]] = {"ours": [], "torch-fidelity": []}
        for _ in range(rounds):
            for name, run in (("ours", lambda: ours(a, b, weights, False)), ("torch-fidelity", lambda: fresh(False))):
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    count = sum(1 for folder in (a, b) for path in Path(folder).rglob("*") if path.is_file())
    rates = {name: count / statistics.median(values) for name, values in seconds.items() if values}
    result = {
        "machine": describe(),
        "pictures": count,
        "ours and torch-fidelity's": figures,
        "kid standard deviation of a subset": reference["kernel_inception_distance_std"],
        "seconds": seconds,
        "pictures per second": rates,
    }
    click.echo(json.dumps(rates))
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
