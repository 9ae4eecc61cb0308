"""Results as Markdown."""

from __future__ import annotations


def result_table(results: list[dict]) -> str:
    """One Markdown table of what several methods reached on the same budget.

    Args:
        results: contents of ``result.json``, the main method first.
    """
    first = results[0]
    rows = []
    if "before" in first:
        rows.append(("before (fresh head)", "", first["before"]))
    for result in results:
        name = result["method"].upper()
        if "after_frozen_wing" in result:
            rows.append((name, "adaptive", result["after"]))
            rows.append((name, "frozen", result["after_frozen_wing"]))
        else:
            rows.append((name, "", result["after"]))
    seconds = ", ".join(f"{result['method']} {result['seconds']:.0f} s" for result in results)
    attack = f"PGD-{first['eval_steps']}"
    lines = [
        f"| {first['test_images']} test images | wing | clean | {attack} |",
        "|---|---|---|---|",
        *(f"| {name} | {wing} | {100 * v['clean']:.1f} % | {100 * v['robust']:.1f} % |" for name, wing, v in rows),
    ]
    return "\n".join(lines) + f"\n\ntraining and testing: {seconds} on {first['threads']} threads"
