"""The regression baseline: the pixel-space network of ``refiner`` on plain interpolation, trained as long as a model.

What it saw is written into its file, so that an evaluation can refuse a network that has learnt from the patients it
is to be judged on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from latentcache import InputError, LatentStore, PairRecord
from pipeline.refiner.refiner import RefinerFile


def training_pairs(pairs: Iterable[PairRecord]) -> list[str]:
    """Pair keys that any training on a store may see, sorted."""
    return sorted(p.pair_key for p in pairs if p.split == "train" and p.status == "ok")


def digest(keys: Sequence[str]) -> str:
    """A short name of a set of pair keys."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:16]


def training_recipe(store: LatentStore, keys: Sequence[str], seconds: float, steps: int, seed: int) -> dict[str, Any]:
    """Return the facts of training that the network's file holds."""
    return {
        "training_pairs": digest(keys),
        "pairs": len(keys),
        "snapshot": store.snapshot,
        "store_fingerprint": store.secret_fingerprint,
        "seconds": round(seconds, 1),
        "steps": steps,
        "seed": seed,
    }


def regression_facts(file: RefinerFile) -> dict[str, Any]:
    """Return the facts that an evaluation states of the network.

    Raises:
        InputError: A refiner of a model's output, or one that does not say what it was trained on.
    """
    network, card = file.load()
    if card.detail != "none" or "training_pairs" not in card.recipe:
        raise InputError(
            "a network that is no regression baseline",
            expected="the run of `ctpipe train-regression`",
            remedy="Train one: ctpipe train-regression STORE RUN2 --like RUN.",
        )
    parameters = sum(p.numel() for p in network.parameters())
    return {"sha256": file.sha256, "parameters": parameters, **card.recipe}


def check_same_split(file: RefinerFile, store: LatentStore, evaluated: Sequence[PairRecord]) -> None:
    """Refuse a network of this store that was trained on other pairs than the training split, or on evaluated ones.

    A network of another store cannot be checked by keys and is let through: its patients are others.

    Raises:
        InputError: The network has seen what it is to be judged on, or cannot show that it has not.
    """
    recipe = file.load()[1].recipe
    if recipe["store_fingerprint"] != store.secret_fingerprint:
        return
    then = store if recipe["snapshot"] == store.snapshot else LatentStore.open(store.url, snapshot=recipe["snapshot"])
    seen = training_pairs(then.pairs())
    patients = {p.patient_key for p in then.pairs() if p.pair_key in set(seen)}
    both = [p.pair_key for p in evaluated if p.split != "train" and p.patient_key in patients]
    if digest(seen) != recipe["training_pairs"] or both:
        raise InputError(
            f"a regression network that learnt from {len(both)} of the patients' pairs to be evaluated"
            if both
            else "a regression network that learnt from other pairs than the training split",
            expected="one trained on the training split alone",
            remedy="Train it again: ctpipe train-regression STORE RUN2 --like RUN.",
        )
