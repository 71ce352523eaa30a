"""Prints `docs/recipe_keys.md`, made from the class that reads a recipe.

python docs/recipe_keys.py > docs/recipe_keys.md
"""

from video_ma2mba.training.recipe import recipe_keys

HEAD = """\
# Recipe keys

Everything that decides a training, in the order of the code. `video-ma2mba train RECIPE --set KEY=VALUE` changes one,
as often as it is given; a recipe of your own is a YAML file of them. `video-ma2mba train --keys` prints this table.
`make docs` writes this page.

| key | value | default | meaning |
| --- | --- | --- | --- |
"""


def page() -> str:
    rows = []
    for key in recipe_keys():
        default = f"`{key.default}`" if key.default else "must be given"
        rows.append(f"| `{key.name}` | {key.kind} | {default} | {key.meaning} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
