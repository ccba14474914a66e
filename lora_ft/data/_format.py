"""What row formats share, and the kinds of examples they make.

| kind | fields |
|---|---|
| conversation | messages: [{role, content, ...}], tools? |
| prompt | prompt, completion? |
| text | text |
| labelled | text, text_pair?, label? (str, int or float; a number in a CSV file is text) or labels? (list of str) |
| tokens | tokens: [str], tags?: [str] |
| question | question, context, answers?: [{text, start}] (empty: no answer in this context), id? |
| choices | question, choices: [str], label?: int |
| pairs | anchor, positive?, negative? |
| arrays | inputs: array or {name: array}, columns?: names of the numbers of the one array, target?: number or array |
| labelled_image | image, label? (str, int or float) or labels? (list of str) |
| image_mask | image, mask? |
| boxes | image, boxes?: [[x, y, width, height]], labels?: [str], crowd?: [bool] (left out: none is), id? |
| labelled_audio | audio, label? or labels?, as labelled_image |
| audio_text | audio, text? |
| image_conversation | messages: [{role, content: [{type: text, text} or {type: image, image}]}] |

Images, masks and sounds are as the row has them: a path from the example's root, the bytes of a file, {bytes, path},
{array, sampling_rate}, an array, or a PIL image. Nothing is read before a task asks for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class RowFormat:
    """Base of formats: a subclass whose row is one example defines `to_example`, another one `to_examples`.

    Attributes:
        kind: what its examples hold.
        answer: the required column that rows for prediction may lack.
        aliases: further names of a required column, as data sets on the hub have them.
    """

    kind: str
    required: tuple[str, ...]
    answer: str | None = None
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def matches(self, columns: frozenset[str], first_rows: Sequence[Mapping[str, Any]]) -> bool:
        """Every required column is there, under one of its names."""
        return all(self.named(column, columns) for column in self.required)

    def named(self, column: str, columns: frozenset[str] | Mapping[str, Any]) -> str | None:
        """The name under which `columns` has this column, or None."""
        return next((name for name in (column, *self.aliases.get(column, ())) if name in columns), None)

    def to_examples(self, row: Mapping[str, Any], answered: bool) -> list[dict[str, Any]]:
        """The one example."""
        return [self.to_example(row, answered)]

    def group_of(self, fields: Mapping[str, Any], where: str) -> str:
        """What a split must keep together with this one of several examples of a row: all of them."""
        return where

    def to_example(self, row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
        """Canonical fields of one row; raises ValueError with what is wrong with it."""
        raise NotImplementedError
