"""What `quoted_numbers.check` finds on pages that were broken on purpose."""

from __future__ import annotations

import pytest
from quoted_numbers import Record, check, numbers

RECORDS = {
    "demo": Record(
        ce=2.3207,
        rows=[
            {"name": "dense", "seed": 0, "ce": 2.3207, "tokens": 819200, "recovered": None},
            {"name": "latent", "seed": 0, "ce": 2.3380, "tokens": 819200, "recovered": 0.954},
            {"name": "latent", "seed": 1, "ce": 2.3452, "tokens": 819200, "recovered": 0.941},
        ],
    )
}
RULES = {"arXiv id": r"\b\d{4}\.\d{5}\b", "version": r"triton \d+\.\d+"}
PAGE = """# A title

The loss is 2.321 nats (arXiv 2512.20687, triton 3.9) at
4,096 tokens, `--steps 30`, in fp32 and ZeRO-3; [here](runs/7.md).

| plan | tokens | CE | recovered |
|---|---|---:|---|
| dense | 0.82M | 2.321 |  |
| **`latent`** | 0.82M | 2.342 ± 0.004 | 95% |

```bash
run --steps 100  # in one go
```
"""
ENTRIES = {
    "claims": "loss is {demo['ce']} nats",
    "not_measured": {"setting": ["at 4,096 tokens"]},
    "tables": [
        {
            "table": "| plan | tokens |",
            "key": ["plan", "tokens"],
            "rows": "demo.where(name=name, tokens=about(cells['tokens'], 1e6))",
            "columns": {
                "CE": "rows.mean('ce'); rows.spread('ce')",
                "recovered": "rows.mean('recovered') and 100 * rows.mean('recovered')",
            },
        }
    ],
}


def problems(old: str = "", new: str = "", **entries) -> str:
    """What is wrong with the page after `old` was replaced, under the entries given in place of `ENTRIES`'."""
    assert old in PAGE
    return "\n".join(check(PAGE.replace(old, new), {**ENTRIES, **entries}, RULES, RECORDS))


def test_a_page_whose_numbers_are_all_claimed_and_right():
    assert problems() == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.321 nats", "2.331 nats", "line 3: 2.331 is printed, 2.3207 recorded"),
        ("2.321 nats", "2.3 nats", ""),
        ("2.321 nats", "2.3210 nats", "line 3: 2.3210 is printed"),
        ("A title", "A title of 7 words", "line 1: nobody claims 7"),
        ("# in one go", "# in 5 minutes", "line 12: nobody claims 5"),
        ("```bash", "```", "line 12: nobody claims 100"),
        ("4,096 tokens", "8,192 tokens", "not_measured (setting): 'at 4,096 tokens' matches no number"),
        ("The loss is", "Its loss was", "claim matches nothing: \"loss is"),
        ("| 2.321 |", "| 2.320 |", "line 8: 2.320 is printed"),
        ("| 2.321 |", "| 2.321 ± 0.001 |", "line 8: 0.001 stands where the record has nothing"),
        ("± 0.004", "", "line 9: CE prints nothing for  rows.spread('ce')"),
        ("± 0.004", "± 0.004 (2 seeds)", "line 9: nobody claims 2"),
        ("| 2.321 |  |", "| 2.321 | 3% |", "line 8: 3 stands where the record has nothing"),
        ("| 95% |", "|  |", "line 9: recovered prints nothing"),
        ("| dense | 0.82M", "| dense | 2.62M", "line 8: demo.where(name=name, tokens=about("),
        ("`latent`", "latents", "line 9: demo.where"),
        ("| plan |", "| plans |", "0 tables begin with '| plan | tokens |'"),
        ("| CE |", "| loss |", "has no column ['CE']"),
    ],
)  # fmt: skip
def test_a_page_that_was_changed(old, new, message):
    found = problems(old, new)
    assert message in found and bool(message) == bool(found)


def test_a_record_that_was_changed():
    changed = {"demo": Record(RECORDS["demo"], ce=2.31)}
    assert "2.321 is printed, 2.31 recorded" in "\n".join(check(PAGE, ENTRIES, RULES, changed))


@pytest.mark.parametrize(
    ("expression", "right"),
    [("> 2.3", True), ("> 2.4", False), ("<= 2.4", True), ("<= 2.3", False), (">= 2.321", True)],
)
def test_bounds(expression, right):
    assert (problems(claims=f"loss is {{{expression}}} nats") == "") is right


def test_an_entry_inside_a_longer_number_matches_nothing():
    assert "matches no number" in problems(not_measured={"setting": ["at 4,096 tokens", "4,09"]})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("fp32, sm_90, ZeRO-3, Qwen2.5-7B, 0.5.5", ["0.5"]),
        (
            "x16 and +0.9%, -7% (-1.5), 300-600, 16-token, a 1e-4",
            ["16", "+0.9", "-7", "-1.5", "300", "600", "16", "1e-4"],
        ),
        ("first\n35,131, then\n2.5\n- 3 of 1/32", ["35,131", "2.5", "3", "1", "32"]),
        ("<!-- 7 --> `8` [a](b9.md) https://a.b/10 c11", []),
        ("1. first\n2. second of 3\n", ["3"]),
    ],
)
def test_what_a_number_is(text, found):
    assert [number.text for number in numbers(text)] == found
