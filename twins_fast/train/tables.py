"""Results as Markdown."""

from __future__ import annotations

from twins_fast.evaluation.results import percent


def result_table(results: list[dict]) -> str:
    """One Markdown table of what several methods reached on the same budget, each figure with its standard error.

    Args:
        results: contents of ``result.json``, the main method first.
    """
    first = results[0]
    rows = [("before training", "", first["before"])] if "before" in first else []
    overfitting = []
    for result in results:
        name = result["method"].upper()
        twin = "after_frozen_wing" in result
        rows.append((name, "adaptive" if twin else "", result["after"]))
        if twin:
            rows.append((name, "frozen", result["after_frozen_wing"]))
        best = result["best"]
        if any(best[key] != result["after"][key] for key in ("clean", "robust")):  # another network than the last one
            rows.append((f"{name}, epoch {best['epoch']}", "adaptive" if twin else "", best))
            overfitting.append(f"{result['method']} {100 * (best['robust'] - result['after']['robust']):+.1f}")
    chosen_on = {"validation": "validation images", "test": "the test images themselves"}[first["best"]["chosen_on"]]
    seconds = ", ".join(f"{result['method']} {result['seconds']:.0f} s" for result in results)
    lines = [
        f"| {first['after']['images']} test images | wing | clean | PGD-{first['eval_steps']} |",
        "|---|---|---|---|",
        *(f"| {name} | {wing} | {_percent(v, 'clean')} | {_percent(v, 'robust')} |" for name, wing, v in rows),
    ]
    return (
        "\n".join(lines)
        + f"\n\nThe last network of each method and, if that is another, the best one under attack on {chosen_on}. "
        + (f"Robust overfitting, best minus last in points: {', '.join(overfitting)}. " if overfitting else "")
        + f"Training and testing: {seconds} on {first['threads']} threads."
    )


def _percent(accuracy: dict, key: str) -> str:
    return percent(accuracy[key], accuracy["images"])
