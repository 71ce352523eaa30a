"""The asking half of `VideoMemory`: questions answered from copies of the states a video left behind."""

import threading
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

MAX_QUESTION_TOKENS = 8192


class VideoMemoryAnswers:
    """Answers from `_cache`, the states after the video, which it never changes."""

    model: Any
    processor: Any
    dialogue: list[dict]
    _cache: Any

    def ask(self, question, *, stream=False, **generate_kwargs):
        """Answer from a copy of the states; the memory stays as it is.

        Args:
            question: one question, or a list of them, which are answered in one batch.
            stream: yield the text of the answer to one question as it is produced; closing the iterator stops it.
            generate_kwargs: for `generate`, such as max_new_tokens.

        Returns:
            The answer; a list of answers for a list; an iterator of pieces of text with `stream`.

        Raises:
            ValueError: an empty question, or a list to be streamed.
        """
        questions = [question] if isinstance(question, str) else list(question)
        for number, text in enumerate(questions, 1):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"question {number} is empty")
        if not questions:
            return []
        dialogues = [[{"role": "user", "content": text}] for text in questions]
        if stream:
            if not isinstance(question, str):
                raise ValueError("only one question at a time can be streamed")
            return self._stream(dialogues[0], generate_kwargs)
        answers = [self._text(ids) for ids in self._generate(dialogues, generate_kwargs)]
        return answers[0] if isinstance(question, str) else answers

    def chat(self, message, *, stream=False, **generate_kwargs):
        """As `ask` one question, but what was said before stands in the prompt, and `message` is added to `dialogue`.

        Raises:
            ValueError: an empty message.
        """
        if not message.strip():
            raise ValueError("the message is empty")
        dialogue = [*self.dialogue, {"role": "user", "content": message}]
        if not stream:
            answer = self._text(self._generate([dialogue], generate_kwargs)[0])
            self.dialogue = [*dialogue, {"role": "assistant", "content": answer}]
            return answer

        def pieces():
            said = []
            for piece in self._stream(dialogue, generate_kwargs):
                said.append(piece)
                yield piece
            self.dialogue = [*dialogue, {"role": "assistant", "content": "".join(said).strip()}]

        return pieces()

    def num_prompt_tokens(self, question):
        """Tokens of the prompt of `question` after the video."""
        return len(self._tail([{"role": "user", "content": question}]))

    def generate(self, questions, **generate_kwargs):
        """The token ids of the answers to a list of `questions`: int64 (new tokens,) each. The rest is as of `ask`."""
        return self._generate([[{"role": "user", "content": text}] for text in questions], generate_kwargs)

    @torch.no_grad()
    def log_likelihoods(self, question, answers):
        """How likely the model finds each of some answers to a question.

        Args:
            question: a text. answers: texts; none may be empty.

        Returns:
            float32 (answers,), natural logarithms of the probability of all tokens of an answer, without the end of
            its turn.

        Raises:
            ValueError: an answer without a token.
        """
        tail = self._tail([{"role": "user", "content": question}])
        tokenizer = self.processor.tokenizer
        said = [
            torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long) for text in answers
        ]
        if not said or not all(len(ids) for ids in said):
            raise ValueError("every answer must have at least one token")
        ids, mask = self._left_padded([torch.cat([tail, one]) for one in said])
        cache = self._cache.copy()
        cache.batch_repeat_interleave(len(said))
        keep = max(len(one) for one in said) + 1
        logits = self.model(
            ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=keep
        ).logits  # (answers, keep, vocabulary)
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1 - keep :, None])[..., 0]
        return torch.stack([row[-len(one) :].sum() for row, one in zip(log_probs, said, strict=True)])

    def _left_padded(self, rows):
        """Rows of ids as one batch on the model's device, and its mask: int64 (rows, tokens)."""
        longest, device = max(len(row) for row in rows), self.model.device
        ids = torch.full((len(rows), longest), self.processor.tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = row.to(device)
            mask[number, longest - len(row) :] = 1
        return ids, mask

    @torch.no_grad()
    def _generate(self, dialogues, generate_kwargs):
        tails = [self._tail(dialogue) for dialogue in dialogues]
        for number, tail in enumerate(tails, 1):
            if len(tail) > MAX_QUESTION_TOKENS:
                raise ValueError(
                    f"question {number} has {len(tail)} tokens, with what was said before; at most "
                    f"{MAX_QUESTION_TOKENS} are taken: ask more briefly"
                )
        ids, mask = self._left_padded(tails)
        cache = self._cache.copy()
        cache.batch_repeat_interleave(len(tails))
        # a mask that covers the video, too: it says that the ids are the new ones alone
        mask = torch.cat([mask.new_ones(len(mask), cache.num_tokens), mask], dim=1)
        sequences = self.model.generate(ids, attention_mask=mask, cache=cache, **generate_kwargs)
        return list(sequences[:, ids.shape[1] :])

    def _stream(self, dialogue, generate_kwargs):
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure, stopped = [], threading.Event()

        def stop(input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        criteria = StoppingCriteriaList([*generate_kwargs.pop("stopping_criteria", []), stop])

        def work():
            try:
                self._generate([dialogue], {**generate_kwargs, "streamer": streamer, "stopping_criteria": criteria})
            except BaseException as error:  # handed to whoever reads the text
                failure.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:  # also where the reader has had enough
            stopped.set()
            thread.join()
        if failure:
            raise failure[0]

    def _text(self, ids):
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # --- the prompt --------------------------------------------------------------------------------------------------

    def _prompt(self, dialogue):
        """Token ids of a dialogue about a video of one frame, and where that frame stands."""
        side = self.processor.video_processor.side
        frame = {"type": "video", "video": torch.zeros(1, 3, side, side, dtype=torch.uint8)}
        first, *rest = dialogue
        content = [frame, {"type": "text", "text": first["content"]}]
        ids = self.processor.apply_chat_template(
            [{"role": "user", "content": content}, *rest],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )["input_ids"][0]  # fmt: skip
        places = (ids == self.processor.video_token_id).nonzero().flatten()
        return ids, places[0], places[-1]

    def _head(self):
        ids, first, _ = self._prompt([{"role": "user", "content": "?"}])
        return ids[None, :first]

    def _tail(self, dialogue):
        ids, _, last = self._prompt(dialogue)
        return ids[last + 1 :]
