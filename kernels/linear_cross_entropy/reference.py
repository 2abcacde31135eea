"""Head product and cross-entropy in plain maths, for the tests."""

import torch


def linear_cross_entropy_reference(
    x_TD: torch.Tensor, weight_VD: torch.Tensor, label_T: torch.Tensor, *, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over labelled tokens of `lse - logit[label] + z_loss lse^2`, and the first two terms token by token."""
    logits_TV = x_TD @ weight_VD.t()
    lse_T = logits_TV.logsumexp(-1)
    labelled_T = label_T != -100
    chosen_T = logits_TV.gather(1, label_T.clamp(min=0)[:, None])[:, 0]
    loss_T = torch.where(labelled_T, lse_T - chosen_T, 0.0)
    penalty_T = torch.where(labelled_T, z_loss * lse_T.square(), 0.0)
    return (loss_T + penalty_T).sum(), loss_T.detach()
