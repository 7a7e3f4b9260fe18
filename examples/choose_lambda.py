"""Choose lambda of the mixture for your clients: train a few, compare them image by image.

    python examples/choose_lambda.py            # six lambdas, about two minutes on one core
    python examples/choose_lambda.py --quick    # three lambdas at a size of seconds

Every lambda trains the same clients from the same weights and is certified on the same images and
noise, so what differs is lambda. The recommendation names the best and all of which no difference
to it is shown (95 %, corrected for the number of pairs). Its ACR is a little too good to report,
being the best of several: report the choice on images that did not take part in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from certifl.experiments.run import Options, run
from certifl.paper.scales import quickstart
from certifl.report import load_runs
from certifl.report.compare import Comparison, Pairs, compare, standing
from certifl.spec import Spec, with_settings

LAMBDAS, QUICK_LAMBDAS = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.5, 0.9)
QUICK = (
    "clients.count=2",
    "data.train_images=80",
    "training.rounds=4",
    "certification.images=12",
    "certification.n=300",
)


def study(value: float, quick: bool) -> Spec:
    """The study with this lambda. Put your own data, clients and schedule here."""
    values = quickstart()["mixture"].model_dump(exclude_none=True)
    values |= {"name": f"lambda = {value}"}
    values["algorithm"] = {"name": "mixture", "personalization": value}
    return with_settings(values, QUICK if quick else ())


def table(lambdas: Sequence[float], found: Comparison) -> str:
    """Average certified radius (rad): a row for each client, a column for each lambda."""
    rows = [f"client {c.client:<6d}" + "".join(f"{a:8.3f}" for a in c.acr) for c in found.clients]
    head = "lambda       " + "".join(f"{value:8g}" for value in lambdas)
    mean = "mean         " + "".join(f"{a:8.3f}" for a in found.acr)
    return "\n".join([head, *rows, mean])


def recommended(lambdas: Sequence[float], acr: Sequence[float], pairs: Pairs) -> str:
    """The best lambda, and those not shown to be worse."""
    who = standing(acr, pairs)
    best = f"lambda = {lambdas[who.best]:g}"
    if not who.tied:
        return f"{best} is better than all others."
    tied = ", ".join(f"{lambdas[i]:g}" for i in who.tied)
    rest = len(lambdas) - 1 - len(who.tied)
    told = " It is better than the rest." if rest else " These images cannot tell; more would."
    return f"{best} is ahead; no difference shown to {tied}.{told}"


def personal(lambdas: Sequence[float], found: Comparison) -> list[str]:
    """Clients whose own images show that another lambda suits them better than the common one."""
    common = standing(found.acr, found.pairs).best
    lines = []
    for client in found.clients:
        best = standing(client.acr, client.pairs).best
        if best != common and client.pairs[min(best, common), max(best, common)].shown:
            lines.append(f"client {client.client} is better off with {lambdas[best]:g}")
    return lines or ["no client is shown to be better off with another one"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Choose lambda of the mixture on digits.")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/choose_lambda"))
    given = parser.parse_args(arguments)
    lambdas = QUICK_LAMBDAS if given.quick else LAMBDAS
    folders: list[Path | str] = []
    for value in lambdas:  # a run that is finished is not repeated
        folder = given.out / ("quick" if given.quick else "full") / f"{value:g}"
        folders.append(run(study(value, given.quick), Options(folder)).path)
    found = compare(load_runs(folders))
    print(table(lambdas, found))
    print(f"\n{recommended(lambdas, found.acr, found.pairs)}")
    print(f"By client, each by itself: {'; '.join(personal(lambdas, found))}.")


if __name__ == "__main__":
    main()
