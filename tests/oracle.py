"""The MoE layer, dense, in float64 on one process: it shares no code with the library."""

import torch


def dense_moe(
    hidden_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    w13_EIH: torch.Tensor,
    w2_EHI: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
) -> torch.Tensor:
    """Every expert computes every token; a dense matrix of weights selects. Ties go to the lowest id."""
    scores_TE = torch.softmax(logits_TE.double(), dim=1)
    # The rank of an expert among those of its token: how many score higher, or as high and come before it.
    higher_TEE = scores_TE.unsqueeze(1) > scores_TE.unsqueeze(2)
    before_EE = torch.ones(scores_TE.shape[1], scores_TE.shape[1]).tril(-1).bool()
    equal_TEE = (scores_TE.unsqueeze(1) == scores_TE.unsqueeze(2)) & before_EE
    weights_TE = torch.where((higher_TEE | equal_TEE).sum(2) < top_k, scores_TE, 0.0)
    if renormalize:
        weights_TE = weights_TE / weights_TE.sum(1, keepdim=True)
    gate_TEI, up_TEI = torch.einsum("th,eih->tei", hidden_TH.double(), w13_EIH.double()).chunk(2, dim=2)
    down_TEH = torch.einsum("tei,ehi->teh", gate_TEI / (1 + torch.exp(-gate_TEI)) * up_TEI, w2_EHI.double())
    return torch.einsum("te,teh->th", weights_TE, down_TEH)
