"""What Multi-Axis Gradient Checkpointing costs, plan by plan: plain Python, no torch.

Letters: L layers, S tokens, l layers and s tokens of a cell, n = ceil(S / s) time blocks, G = ceil(L / l) layer
blocks. A forward and backward pass without recompute takes 3 compute units: one forward, two backward. `layer_major`
and a cell of all layers take one unit more. `sequence_major` with l < L also computes the lower borders of each time
block again: one more forward pass of all layers but those of the last layer block.

Tokens before a gradient horizon take one unit, and the memory of a chunk that is watched; S is then the rest.

`peak_bytes` follows the executor (see `checkpointing`) to the few moments that can be its worst and adds up what lives
there. Weights, and the gradients of parameters summed in float32, are not in it.

On the kernels a layer takes a fixed number of launches, whatever the tokens: a cell of fewer tokens than the host can
launch for takes the time of one that has them, and plans are weighed so.
"""

from .segment_sizes import KERNEL_SEGMENT, SCAN_CHUNK, SEGMENT

# Of a layer: forward, forward again and backward, on the kernels, as a test counts them. The rest is of an H100: a
# launch, and products of matrices in bfloat16 and traffic of its memory as they are reached.
LAUNCHES, LAUNCH_S = 72, 6e-6
FLOPS_PER_S, BYTES_PER_S = 650e12, 3e12


class Costs:
    """The cost model for a batch of one shape, in bytes."""

    def __init__(
        self,
        config,
        batch_size,
        sequence_length,
        dtype_bytes=2,
        num_supervised_tokens=None,
        num_frames=0,
        trains_vision=True,
        scan_backend="torch",
        num_gradient_tokens=None,
        compute_bytes=None,
    ):
        for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
            if not is_whole_number(value) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        # e: of a number in weights and embeddings, c: in what linear layers give
        text, b, e, c = config.text_config, batch_size, dtype_bytes, compute_bytes or dtype_bytes
        self.config, self.batch_size, self.sequence_length = config, batch_size, sequence_length
        # the tokens that the plan cuts; those before are watched, a chunk at a time
        self.num_tokens = min(sequence_length, num_gradient_tokens or sequence_length)
        self.num_watched = sequence_length - self.num_tokens
        self.num_layers = text.num_hidden_layers
        heads, inner, wide = text.num_heads, text.num_heads * text.head_dim, max(4, e)
        conv_dim = inner + 2 * text.n_groups * text.state_size

        # --- per token -----------------------------------------------------------------------------------------------
        self.embedding = b * text.hidden_size * e
        # the residual stream between blocks, which a block's norm keeps
        self.stream = b * text.hidden_size * (wide if text.residual_in_fp32 else e)
        self.casts_embeddings = self.stream != self.embedding  # the first block keeps a cast of them
        # in_proj's output (gate, x, B, C, dt), which a mixer keeps
        self.projected = b * (inner + conv_dim + heads) * c
        self.inner = b * inner * c  # out_proj's input, not kept
        self.scanned = self.inner if scan_backend == "mamba_ssm" else 0  # the scan's output, which the kernels keep
        # While one layer goes back: the gradients of its output, of out_proj's input, and of in_proj's output. When
        # in_proj goes back, its input, computed again, and the gradient of that take no more room than these.
        self.going_back = self.stream + self.inner + self.projected
        # While one layer goes forward without a graph: its input, the normed input, in_proj's output, out_proj's input,
        # and its output
        self.going_forward = 2 * self.stream + self.embedding + self.projected + self.inner + self.scanned

        # --- per layer -----------------------------------------------------------------------------------------------
        ssm_state = b * inner * text.state_size * wide
        self.state = ssm_state + b * (text.conv_kernel - 1) * conv_dim * wide
        self._core_sizes = heads, b * wide, b * c, inner, conv_dim, ssm_state
        self._chunk_size = text.chunk_size
        self.segment, self._core, self.busy_tokens = SEGMENT, self._core_of_torch, 0.0
        if scan_backend == "mamba_ssm":
            self.segment, self._core = KERNEL_SEGMENT, self._core_of_kernels
            # of a cell, from which on its work takes longer than its launches
            products = 2 * b * text.hidden_size * (2 * inner + conv_dim + heads)
            traffic = 4 * (self.stream + self.projected) + 6 * self.inner + 2 * self.embedding
            self.busy_tokens = LAUNCHES * LAUNCH_S / (4 * (products / FLOPS_PER_S + traffic / BYTES_PER_S))
        self._core_of_a_segment = self._core(self.segment)

        # --- the ends of the model -----------------------------------------------------------------------------------
        # The loss: of the supervised tokens the hidden states before and after the final norm and their gradients; of
        # one chunk the logits three times in float32 (themselves, their log-softmax, their gradient), or once in the
        # dtype of the head beside the chunk's contribution to its gradient; the head's gradient in float32.
        supervised = b * sequence_length if num_supervised_tokens is None else num_supervised_tokens
        if num_supervised_tokens is None:
            supervised = min(supervised, config.loss_chunk_size)
        chunk = min(supervised, config.loss_chunk_size)
        vocab, head = text.vocab_size, text.vocab_size * text.hidden_size
        logits = chunk * vocab
        self.kept = supervised * text.hidden_size * (wide if text.residual_in_fp32 else e)  # their gradient stays
        self.loss = head * 4 + max(logits * 3 * 4, logits * c + head * c) + 2 * self.kept
        self.vision = _vision_bytes(config, num_frames, e, trains_vision)
        self.watching_vision = _vision_bytes(config, num_frames, e, trains=False)
        self.watching = self.watching_bytes(self.num_watched)

    def core(self, num_tokens):
        """What the core of a mixer (convolution, scan, gated norm) takes for one segment: forward, and backward."""
        return self._core_of_a_segment if num_tokens >= self.segment else self._core(num_tokens)

    def _core_of_kernels(self, q):
        """Derived from the shapes that the kernels' wrappers allocate; not counted."""
        heads, wide, narrow, inner, conv_dim, ssm_state = self._core_sizes
        c = -(-q // self._chunk_size)
        conv = 3 * q * conv_dim * narrow  # its input beside the conv state, its output, and that after the activation
        states = c * ssm_state  # at the start of each chunk, float32
        scores = c * self._chunk_size**2 * wide
        steps = q * heads * wide
        forward = conv + 2 * states + scores + 2 * steps + q * inner * narrow
        # the states, their gradients before and after they are handed on, those of x, B and C, and the norm's two
        backward = conv + 3 * states + 2 * scores + 6 * steps + q * (conv_dim + 2 * inner) * narrow
        return forward, backward

    def _core_of_torch(self, q):
        heads, wide, narrow, inner, conv_dim, ssm_state = (
            self._core_sizes
        )  # wide and narrow: bytes of a batch of numbers
        c = -(-q // SCAN_CHUNK)  # blocks of the scan
        x = q * inner * wide  # a tensor like x, y or the gate
        scores = c * min(q, SCAN_CHUNK) ** 2 * heads * wide  # the matrix form inside the blocks
        conv = q * conv_dim * wide  # its output after the activation
        # Forward, worst where the scan gives its output: the states at the block starts and what each block adds, the
        # new state, a score matrix, and of tensors like x: x, x dt, the two halves of y, what they come from, the skip.
        forward = (2 * c + 1) * ssm_state + scores + conv + 7 * x
        # Backward, the worse of two moments: in the gated norm, with all that the scan keeps for its own backward pass,
        in_norm = (2 * c + 1) * ssm_state + (12 if narrow < wide else 11) * x
        # or in the hand-over of the states, with the gradients of all of them.
        in_states = 5 * c * ssm_state + 3 * x + q * self.inner
        both = 3 * scores + conv + 2 * q * conv_dim * narrow + q * self.inner + 8 * q * heads * wide
        return forward, both + max(in_norm, in_states)

    def watching_bytes(self, num_tokens):
        """What is watched goes through the tower and the layers a chunk at a time, with the states before and after."""
        chunk = min(num_tokens, self.config.prefill_chunk_size)
        if chunk == 0:
            return 0
        inner_states = (-(-chunk // self.segment) - 1) * self.state
        forward = max(chunk * self.going_forward + inner_states + self.core(chunk)[0], self.watching_vision)
        return chunk * self.embedding + 2 * self.num_layers * self.state + forward

    def slowdown(self, num_chunks):
        """By how much launches hold up a pass in so many time blocks: 1 where the GPU always has work."""
        return max(1.0, num_chunks * self.busy_tokens / self.num_tokens)

    def units(self, order, layer_interval):
        """Compute units of a forward and backward pass."""
        if order == "layer_major":
            return 4.0
        blocks = -(-self.num_layers // layer_interval)
        return 4 + (blocks - 1) * layer_interval / self.num_layers

    def host_bytes(self, order, layer_interval, sequence_interval, offload):
        """Host memory with `offload`: embeddings and their gradient, states at chunk borders, and lower borders."""
        if not offload:
            return 0
        L, S, n = self.num_layers, self.num_tokens, -(-self.num_tokens // sequence_interval)
        lower = (-(-L // layer_interval) - 1) * S * self.stream if order == "layer_major" else 0
        return 2 * S * self.embedding + n * L * self.state + lower

    def peak_bytes(self, order, layer_interval, sequence_interval, offload):
        """Device memory over weights and gradients: the worst of the moments in which the executor holds most.

        A last time or layer block that is shorter than the others counts as a whole one.
        """
        L, S, s = self.num_layers, self.num_tokens, sequence_interval
        n, G = -(-S // s), -(-L // layer_interval)
        keeps_lower = order == "layer_major"
        inner_states = (-(-s // self.segment) - 1) * self.state  # between the segments of the layer at work
        core_forward, core_backward = self.core(s)
        # A cell keeps its layers' streams and in_proj outputs and its final states; on top one layer goes back.
        cell = layer_interval * (s * (self.stream + self.projected + self.scanned) + self.state)
        cell += s * self.going_back + inner_states + core_backward + self.kept
        cell_of_first = cell + (s * self.stream if self.casts_embeddings else 0)
        lower_of_chunk = (G - 1) * s * self.stream
        forward = s * self.going_forward + inner_states + core_forward + self.kept
        states = L * self.state
        if offload:
            borders = s * self.embedding + states + (lower_of_chunk if keeps_lower else 0)
            # on the way forward the next time block's embeddings are being fetched
            entering = (1 + (n > 1)) * s * self.embedding
            moments = [entering + 2 * states + forward, self.loss, self.vision, self.watching]
            # The last time block, which goes back first: the next one's borders are being fetched; of the states it has
            # gradients only where they came from the layer blocks above. Then the one before it, which has them all.
            blocks = [(n > 1, 0, (L - layer_interval) * self.state)] + [(n > 2, states, states)] * (n > 1)
            for fetches, grads_at_last, grads_at_first in blocks:
                at_work = s * self.embedding + states + fetches * borders
                moments.append(at_work + grads_at_last + lower_of_chunk + cell)
                moments.append(at_work + grads_at_first + cell_of_first)
            return max(moments)
        # Embeddings and their gradient, and the states entering each time block
        kept = 2 * S * self.embedding + n * states
        # The last layer block of the last time block, with all lower borders
        moments = [kept + ((G - 1) * S * self.stream if keeps_lower else lower_of_chunk) + cell]
        # its first layer block, with those of the time blocks before, and the gradients of the states above
        before = (n - 1) * lower_of_chunk if keeps_lower else 0
        moments.append(kept + before + (L - layer_interval) * self.state + cell_of_first)
        moments.append(self.watching)
        # the end of the forward pass, and the loss: no gradient of the embeddings yet
        kept += (G - 1) * S * self.stream if keeps_lower else 0
        kept -= S * self.embedding
        return max(*moments, kept + states + forward, kept + self.loss, S * self.embedding + self.vision)

    def peak_bytes_without(self):
        """As `peak_bytes`, of a pass that keeps what all layers need."""
        S, L = self.num_tokens, self.num_layers
        of_a_layer = S * (self.stream + self.projected + self.scanned) + self.state
        kept = S * self.embedding + L * of_a_layer + S * self.stream
        inner_states = (-(-S // self.segment) - 1) * self.state
        back = S * self.going_back + inner_states + self.core(S)[1] + self.kept
        return max(kept + max(back, self.loss), 2 * S * self.embedding + self.vision)


def _vision_bytes(config, num_frames, e, trains):
    """What a micro-batch of frames takes; a tower that trains keeps the activations of all its layers."""
    frames = min(num_frames, config.vision_chunk_size)
    vision = config.vision_config
    tokens = frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    pixels = (
        frames * 3 * vision.image_size**2 * (4 + 4 + e)
    )  # on two steps of the normalisation, and in the tower's dtype
    # a layer keeps: two norm inputs, two norm outputs, q, k, v, the attention's output; and the wide activation twice
    layer = tokens * (8 * vision.hidden_size + 2 * vision.intermediate_size) * e
    return pixels + layer * (config.num_vision_layers if trains else 1)


def is_whole_number(value):
    return isinstance(value, int) and not isinstance(value, bool)
