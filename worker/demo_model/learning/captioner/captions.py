"""What is said about a scene: plainly, with places, and in German, which no captioner is taught here.

A place is one of nine: the canvas in thirds, across and down. All list the things in the order of the plain caption.
"""

from __future__ import annotations

from worker.demo_model.scenes import CANVAS, Scene, Thing, relation

#: The beginning that asks for places; the caption goes on after it.
PLACES_BEGINNING = "places:"

_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")
_GERMAN_ROWS, _GERMAN_COLUMNS = ("oben", "", "unten"), ("links", "", "rechts")
#: Stem of the adjective, and whether it takes an ending.
_GERMAN_COLOURS = {
    "red": ("rot", True),
    "green": ("grün", True),
    "blue": ("blau", True),
    "yellow": ("gelb", True),
    "purple": ("lila", False),
    "orange": ("orange", False),
    "cyan": ("türkis", True),
    "pink": ("rosa", False),
}
#: Noun, and the ending of an adjective before it: masculine or neuter, after "ein".
_GERMAN_SHAPES = {
    "circle": ("Kreis", "er"),
    "square": ("Quadrat", "es"),
    "triangle": ("Dreieck", "es"),
    "star": ("Stern", "er"),
    "cross": ("Kreuz", "es"),
}


def in_order(scene: Scene) -> tuple[Thing, ...]:
    """The things as the plain caption lists them: two by their relation, three from left to right."""
    things = scene.things
    if len(things) == 2:
        return things[::-1] if relation(*things) in ("right of", "below") else things
    return tuple(sorted(things, key=lambda thing: thing.x))


def places(scene: Scene) -> str:
    """`a red circle top left, a blue star middle`; follows `PLACES_BEGINNING` after a space."""
    return ", ".join(f"{thing.phrase} {_place(thing, _ROWS, _COLUMNS, 'middle')}" for thing in in_order(scene))


def german(scene: Scene) -> str:
    """`Ein roter Kreis oben links und ein blaues Kreuz in der Mitte`: other words, grammar, capitals, umlauts."""
    parts = [f"{_german_name(thing)} {_place(thing, _GERMAN_ROWS, _GERMAN_COLUMNS, 'in der Mitte')}"
             for thing in in_order(scene)]  # fmt: skip
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} und {parts[-1]}"
    return text[0].upper() + text[1:]


def _german_name(thing: Thing) -> str:
    (stem, is_declined), (noun, ending) = _GERMAN_COLOURS[thing.colour], _GERMAN_SHAPES[thing.shape]
    return f"ein {stem}{ending if is_declined else ''} {noun}"


def _place(thing: Thing, rows: tuple[str, ...], columns: tuple[str, ...], middle: str) -> str:
    row, column = (min(2, int(value * 3 / CANVAS)) for value in (thing.y, thing.x))
    return " ".join(word for word in (rows[row], columns[column]) if word) or middle
