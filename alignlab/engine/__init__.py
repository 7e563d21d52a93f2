"""The mathematics: samplers, noise, the policy and the one sampling loop. It needs torch and knows no
configuration."""
