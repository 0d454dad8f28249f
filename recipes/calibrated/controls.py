"""Controls of the study: FIPO's trainer, with other weights on the advantages of the same tokens.

    fipo-trl train --config RECIPE.yaml --trainer recipes.calibrated.controls.ShuffledWeightsTrainer

They tell credit from noise. If FIPO's weights say which tokens matter, the same weights in another order must do worse
(`ShuffledWeightsTrainer`). If they say only which answers matter, one weight for each answer does as well
(`ConstantWeightTrainer`). Weights by what the task itself knows (`OracleTrainer`) show what there is to gain.

All else is FIPO's: the settings, the completions that leave the loss, what is logged. The metrics `fipo/*` of the
weights are those of the weights that the loss applied; `fipo/future_kl` is FIPO's.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fipo_trl import FIPOTrainer
from fipo_trl.objective.influence import InfluenceWeights
from recipes.calibrated.task import decisive_tokens


class ControlTrainer(FIPOTrainer, ABC):
    """FIPO with the weights of `_control`."""

    @abstractmethod
    def _control(self, weights: Tensor, scored: Tensor) -> Tensor:
        """The weights (B, T) to apply in place of FIPO's. Both arguments are (B, T), `scored` is bool."""

    def _influence(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> InfluenceWeights:
        influence = super()._influence(log_ratio, advantages, mask)
        weights = self._control(influence.weights, mask != 0)
        bounds = {"weight_min": self.args.influence_weight_min, "weight_max": self.args.influence_weight_max}
        return influence.reweighted(weights, mask, **bounds)


class UnappliedWeightsTrainer(FIPOTrainer):
    """DAPO, whose metrics `fipo/*` say which weights FIPO would give: by it a task is chosen before FIPO is run."""

    def _influence(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> InfluenceWeights:
        influence = super()._influence(log_ratio, advantages, mask)
        none = torch.zeros_like(influence.statistics.dropped_tokens)
        return replace(
            influence,
            weights=torch.ones_like(influence.weights),
            kept=torch.ones_like(influence.kept),
            statistics=influence.statistics._replace(dropped_sequences=none, dropped_tokens=none),
        )


class ShuffledWeightsTrainer(ControlTrainer):
    """FIPO's weights, in another order over the scored tokens of each answer, drawn anew for each loss.

    The order depends on `seed`, the micro-batch, the process and the row alone, so that a resumed run draws the same.
    """

    def _control(self, weights: Tensor, scored: Tensor) -> Tensor:
        # `_step` counts micro-batches since training began
        rng = np.random.default_rng([self.args.seed, self._step, self.accelerator.process_index])
        shuffled = weights.clone()
        for row, where in enumerate(scored.cpu().numpy()):
            places = np.flatnonzero(where)
            shuffled[row, places] = weights[row, rng.permutation(places)]
        return shuffled


class ConstantWeightTrainer(ControlTrainer):
    """The mean of FIPO's weights over the scored tokens of each answer, on each of them."""

    def _control(self, weights: Tensor, scored: Tensor) -> Tensor:
        tokens = scored.sum(dim=1, keepdim=True).clamp(min=1)
        return (weights * scored).sum(dim=1, keepdim=True).div(tokens).expand_as(weights)


class OracleTrainer(ControlTrainer):
    """`influence_weight_max` on the tokens that decide an answer, by what the task knows, and `influence_weight_min`
    on the others: from the first update of a generation on, and without the safety cap.

    For tokenizers of which each token is one character, or none, as `<eos>`.
    """

    decisive_tokens = staticmethod(decisive_tokens)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        self._characters = [self._tokenizer.decode([token], **options) for token in range(len(self._tokenizer))]

    def _control(self, weights: Tensor, scored: Tensor) -> Tensor:
        inputs, args = self._loss_scope.inputs, self.args
        prompts = self._texts(inputs["prompt_ids"], inputs["prompt_mask"])
        completions = self._texts(inputs["completion_ids"], inputs["completion_mask"])
        decisive = torch.zeros_like(scored)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            text = "".join(completion)
            flags = self.decisive_tokens("".join(prompt), text)
            tokens = [place for place, character in enumerate(completion) if character]
            if not len(flags) == len(tokens) == len(text):
                raise ValueError(
                    f"decisive_tokens gave {len(flags)} values for the {len(tokens)} tokens of '{text}', which has "
                    f"{len(text)} characters: it must give one for each, and each must be one token."
                )
            decisive[row, tokens] = torch.tensor(flags, dtype=torch.bool, device=decisive.device)
        return torch.where(decisive, args.influence_weight_max, args.influence_weight_min).to(weights.dtype)

    def _texts(self, ids: Tensor, mask: Tensor) -> list[list[str]]:
        """The characters of each row (B, T) by token, "" for special tokens and where `mask` is 0."""
        rows = ids.masked_fill(mask == 0, self._tokenizer.pad_token_id).tolist()
        return [[self._characters[token] for token in row] for row in rows]
