"""Rows of ids and what goes with each id, cut and padded as a call asks."""

from typing import Any

from .options_video_ma2mba import TEXT_RULES, check

_UNKNOWN_LENGTH = 10**9  # a tokenizer without a limit says something like 10**30


class RowSettings:
    """The keywords of a call about the rows of a batch, checked.

    Args:
        options: `text_kwargs` as `merge_options` sorts them.
        tokenizer: Its `padding_side`, `truncation_side` and `model_max_length` count where a call says nothing.

    Raises:
        TypeError: `truncation` without a length.
        ValueError: A value that is not known, or that cannot be honoured.
    """

    def __init__(self, options: dict[str, Any], tokenizer: Any):
        check(options, TEXT_RULES)
        if options.get("add_special_tokens") and tokenizer.num_special_tokens_to_add():
            raise ValueError(
                "add_special_tokens=True cannot be honoured: the schema of the chat writes all its marks itself. "
                "Leave it out."
            )
        limit = tokenizer.model_max_length if tokenizer.model_max_length < _UNKNOWN_LENGTH else None
        self.max_length = options.get("max_length")
        self.limit: int | None = limit if self.max_length is None else self.max_length
        # a tokenizer may have been saved with a length that nobody asks for here
        self.strict = self.max_length is not None and self.max_length != tokenizer.init_kwargs.get("max_length")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"max_length must be at least 1, got {self.limit}.")

        padding = options.get("padding", True)
        self.padding = {True: "longest", False: "do_not_pad"}.get(padding, padding)
        if self.padding not in ("longest", "max_length", "do_not_pad") or (
            self.padding == "max_length" and self.limit is None
        ):
            raise ValueError(
                "padding must be True, False, 'longest', 'do_not_pad', or 'max_length' with a max_length; got "
                f"{options.get('padding')!r}."
            )
        self.side = options.get("padding_side", tokenizer.padding_side)
        if self.side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {self.side!r}.")
        self.multiple = options.get("pad_to_multiple_of", 1)
        if self.multiple < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, got {self.multiple}.")

        truncation = options.get("truncation")
        strategies: dict[Any, bool] = {"longest_first": True, "only_first": True, "do_not_truncate": False}
        self.truncation = strategies.get(truncation, truncation)
        if self.truncation not in (True, False, None):
            raise ValueError(f"truncation must be True, False or 'longest_first', got {truncation!r}.")
        if self.truncation and self.limit is None:
            raise TypeError("truncation=True needs a max_length.")
        self.cut_side = tokenizer.truncation_side

    def cut_and_pad(
        self, columns: dict[str, list[list]], fill: dict[str, Any], placeholders: set[int]
    ) -> dict[str, list[list]]:
        """Cuts and pads the rows of all columns alike.

        Args:
            columns: By name, per row, one value per token; `input_ids` among them.
            fill: By name, what stands where a row is padded.
            placeholders: The ids of media, which must not be cut away.

        Raises:
            ValueError: A cut would take tokens of a medium; a row is longer than a `max_length` that says nothing of
                truncation.
        """
        if self.truncation:
            parts = [self._cut(number, row, placeholders) for number, row in enumerate(columns["input_ids"])]
            columns = {
                name: [row[part] for row, part in zip(rows, parts, strict=True)] for name, rows in columns.items()
            }
        longest = max(map(len, columns["input_ids"]))
        if self.truncation is None and self.strict and longest > self.max_length:
            raise ValueError(
                f"A row has {longest} tokens, more than max_length={self.max_length}. Say truncation=True to cut it, "
                "or truncation=False to keep it."
            )
        if self.padding == "do_not_pad":
            return columns
        if self.padding == "max_length":
            longest = max(longest, self.limit or 0)
        length = -(-longest // self.multiple) * self.multiple
        return {name: [self._pad(row, fill[name], length) for row in rows] for name, rows in columns.items()}

    def _cut(self, number: int, ids: list[int], placeholders: set[int]) -> slice:
        surplus = len(ids) - (self.limit or 0)
        if surplus <= 0:
            return slice(None)
        keep, gone = slice(self.limit), slice(self.limit, None)
        if self.cut_side == "left":
            keep, gone = slice(surplus, None), slice(surplus)
        if placeholders.intersection(ids[gone]):
            raise ValueError(
                f"truncation to max_length={self.limit} would cut frames out of row {number}, which has {len(ids)} "
                "tokens. Raise max_length, or take fewer frames by max_frames, num_frames or fps."
            )
        return keep

    def _pad(self, row: list, value: Any, length: int) -> list:
        padding = [value] * (length - len(row))
        return padding + row if self.side == "left" else row + padding
