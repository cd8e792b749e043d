"""The table of the space of methods, mask x encoder form x target, as --list_space prints it."""

from collections import defaultdict

from modeling_finetune import entry_of, list_models
from unimim.cli.flags import in_flags
from unimim.recipes import all_recipes, neighbors

RUNS = "runs"
REFUSED = "-"


def forms() -> dict[str, type]:
    """Return one of the registered classes of each encoder form, by the form's name."""
    found: dict[str, type] = {}
    for name in list_models():
        for cls in entry_of(name).classes:
            if getattr(cls, "form_name", ""):
                found.setdefault(cls.form_name, cls)
    return found


def points() -> dict[tuple[str, str, str], list[str]]:
    """Return the names of the methods at (form, mask, target): those of the published recipes of
    pre-training, and in italics those of our neighbors of them."""
    named = defaultdict(list)
    for recipe in all_recipes():
        ours = recipe in neighbors.RECIPES
        if recipe.stage != "pretrain" or not (recipe.is_published or ours):
            continue
        form = entry_of(recipe.model).classes[0]
        if not getattr(form, "form_name", ""):
            continue
        mask = recipe.flags.get("mask_type", form.own_mask)
        given = (recipe.flags.get(flag) for flag in ("target", "predict_feature"))
        target = next(filter(None, given), form.own_target)
        name = f"*{recipe.method}*" if ours else recipe.method
        if name not in named[form.form_name, mask, target]:
            named[form.form_name, mask, target].append(name)
    return named


def table() -> str:
    """Return the space as a table of Markdown, and below it what is refused and why."""
    named = points()
    known = forms()
    targets = list(next(iter(known.values())).targets)
    lines = [
        f"| encoder form | --mask_type | {' | '.join(targets)} |",
        f"|---|---|{'---|' * len(targets)}",
    ]
    sentences: dict[str, None] = {}
    for form, cls in known.items():
        for mask in cls.masks:
            refusals = [cls.refusal(mask, target) for target in targets]
            sentences |= {in_flags(refusal): None for refusal in refusals if refusal}
            if (all(refusals) and mask == "none") or (cls.in_order and mask != "none"):
                continue  # one sentence says it for all targets
            cells = [
                REFUSED if refusal else "; ".join(named.get((form, mask, target), (RUNS,)))
                for target, refusal in zip(targets, refusals, strict=True)
            ]
            lines.append(f"| {form} | {mask} | {' | '.join(cells)} |")
    said = "\n".join(f"- `{sentence}`" for sentence in sentences)
    return "\n".join(lines) + f"\n\nRefused, each in one sentence:\n\n{said}\n"
