from __future__ import annotations

from collections import Counter

from hypothesis import given, settings, strategies as st

from pipeline.pairing.splits import FRACTIONS, SplitBook, SplitPatient


def patients(n: int, paired: bool = True, start: int = 0) -> list[SplitPatient]:
    return [SplitPatient(f"{i:016x}", "APE" if i % 3 == 0 else "non-APE", paired) for i in range(start, start + n)]


def test_400_patients_are_split_75_15_10_overall_and_in_each_category() -> None:
    cohort = patients(400)
    assigned = SplitBook(seed=0).assign(cohort)
    for members in (cohort, [p for p in cohort if p.category == "APE"], [p for p in cohort if p.category != "APE"]):
        counts = Counter(assigned[p.patient_key] for p in members)
        for split, fraction in FRACTIONS.items():
            assert abs(counts[split] - fraction * len(members)) <= 2


def test_three_patients_fill_all_three_splits() -> None:
    assert sorted(SplitBook(0).assign(patients(3)).values()) == ["test", "train", "val"]


def test_four_patients_leave_two_to_train() -> None:
    assert Counter(SplitBook(0).assign(patients(4)).values()) == {"train": 2, "val": 1, "test": 1}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_the_order_of_scanning_does_not_matter(seed: int, random: object) -> None:
    cohort = patients(40)
    shuffled = list(cohort)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert SplitBook(seed).assign(cohort) == SplitBook(seed).assign(shuffled)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_patients_added_later_keep_the_fractions(parts: list[int]) -> None:
    book, at, counts = SplitBook(3), 0, Counter[str]()
    for part in parts:
        counts.update(book.assign(patients(part, start=at)).values())
        at += part
    for split, fraction in FRACTIONS.items():
        assert abs(counts[split] - fraction * at) <= 2


def test_standing_patients_count_as_if_assigned_here() -> None:
    book = SplitBook(0)
    book.count("APE", True, "test", 100)
    assert "test" not in set(book.assign(patients(200)).values())


def test_patients_without_a_pair_do_not_use_up_the_test_split() -> None:
    lone = patients(50, paired=False, start=1000)
    book = SplitBook(0)
    book.assign(lone)
    assert sorted(book.assign(patients(3)).values()) == ["test", "train", "val"]


def test_the_seed_changes_who_goes_where() -> None:
    assert SplitBook(0).assign(patients(40)) != SplitBook(1).assign(patients(40))
