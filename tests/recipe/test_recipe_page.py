"""docs/recipe.md lists every key of the schema, with its default and its docstring.

python -m tests.recipe.test_recipe_page > docs/recipe.md      # after a change of executor/recipe/schema.py
"""

import typing

from executor.recipe.schema import Recipe
from tests.reference import REPO

HEAD = """# Every key of a recipe

A recipe is a YAML file of the sections below; `--set section.key=value` overrides a key for one run. Unknown keys are
errors. This page is made from `executor/recipe/schema.py` and held equal to it by a test. Which pictures and videos are
read, what happens to damaged ones, and how sizes are chosen: [media.md](media.md).
"""


def kind(annotation: object) -> str:
    """The values a field takes, in words."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(str(value) for value in typing.get_args(annotation))
    options = [option for option in typing.get_args(annotation) if option is not type(None)]
    if type(None) in typing.get_args(annotation) and options:
        return kind(options[0])
    if typing.get_origin(annotation) in (tuple, list):
        return "list"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, "mapping")


def default(value: object, required: bool) -> str:
    if required:
        return "required"
    plain = {None: "null", True: "true", False: "false", (): "[]"}
    text = plain[value] if isinstance(value, bool) or value in (None, ()) else str(value)
    return f"`{text}`"


def page() -> str:
    lines = [HEAD]
    for section in Recipe.model_fields.values():
        lines += [f"## {section.alias}", "", section.annotation.__doc__.strip(), ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        for name, field in section.annotation.model_fields.items():
            value = field.get_default(call_default_factory=True) if not field.is_required() else None
            shown = "`{}`" if value == {} else default(value, field.is_required())
            meaning = " ".join(field.description.split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {kind(field.annotation)} | {shown} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_is_the_schema():
    assert (REPO / "docs" / "recipe.md").read_text() == page()


def test_every_key_is_described():
    for section in Recipe.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description and len(field.description) > 10, f"{section.alias}.{name}"


if __name__ == "__main__":
    print(page(), end="")
