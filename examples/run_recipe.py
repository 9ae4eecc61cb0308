"""Changes a recipe and runs it, with its baseline, from Python: python examples/run_recipe.py FOLDER"""

import sys
from pathlib import Path

from twins_fast.train.recipes import get_recipe
from twins_fast.train.run import run_with_baselines
from twins_fast.train.tables import result_table


def main(folder: str, **sections) -> None:
    recipe = get_recipe("mini", method={"frozen_weight": 0.4}, optimizer={"epochs": 2, "milestones": [1]})
    results = run_with_baselines(recipe.replaced(**sections), Path(folder), None, "cpu", resume=False)
    print(result_table(results))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
