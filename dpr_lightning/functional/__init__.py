"""Pure tensor functions: log-probabilities, rewards, returns, advantages, losses. Torch only."""

from dpr_lightning.functional.advantages import (
    AdvantageEstimator,
    Advantages,
    RawAdvantage,
    WhitenedAdvantage,
    leave_one_out,
    normalize,
)
from dpr_lightning.functional.gae import explained_variance, generalized_advantages, lambda_returns
from dpr_lightning.functional.importance import ImportanceWeights, truncated_importance
from dpr_lightning.functional.kl import k1, k2, k3
from dpr_lightning.functional.logprobs import (
    LMHead,
    StateExpectations,
    TokenLogprobs,
    state_expectations,
    token_logprobs,
)
from dpr_lightning.functional.losses import (
    ClippedPolicyLoss,
    LossOutput,
    PolicyLoss,
    ReinforceLoss,
    policy_loss,
    reinforce_loss,
    sft_loss,
    value_loss,
)
from dpr_lightning.functional.masking import length_mask, masked_mean, masked_sum
from dpr_lightning.functional.pair_losses import (
    BernoulliGSILLoss,
    BrierGSILLoss,
    GSILLoss,
    HingeGSILLoss,
    KLIEPGSILLoss,
    LSIFGSILLoss,
    PairLoss,
    SPINLoss,
)
from dpr_lightning.functional.returns import (
    DiscountedReturns,
    ExpectedReturns,
    ReturnEstimator,
    expected_reward_to_go,
    reward_to_go,
)
from dpr_lightning.functional.rewards import (
    ClippedReward,
    DenseReward,
    DenseWithValueReward,
    Reward,
    SentenceReward,
    TeacherLogprobReward,
)

__all__ = [
    "AdvantageEstimator",
    "Advantages",
    "BernoulliGSILLoss",
    "BrierGSILLoss",
    "ClippedPolicyLoss",
    "ClippedReward",
    "DenseReward",
    "DenseWithValueReward",
    "DiscountedReturns",
    "ExpectedReturns",
    "GSILLoss",
    "HingeGSILLoss",
    "ImportanceWeights",
    "KLIEPGSILLoss",
    "LMHead",
    "LSIFGSILLoss",
    "LossOutput",
    "PairLoss",
    "PolicyLoss",
    "RawAdvantage",
    "ReinforceLoss",
    "ReturnEstimator",
    "Reward",
    "SPINLoss",
    "SentenceReward",
    "StateExpectations",
    "TeacherLogprobReward",
    "TokenLogprobs",
    "WhitenedAdvantage",
    "expected_reward_to_go",
    "explained_variance",
    "generalized_advantages",
    "k1",
    "k2",
    "k3",
    "lambda_returns",
    "leave_one_out",
    "length_mask",
    "masked_mean",
    "masked_sum",
    "normalize",
    "policy_loss",
    "reinforce_loss",
    "reward_to_go",
    "sft_loss",
    "state_expectations",
    "token_logprobs",
    "truncated_importance",
    "value_loss",
]
