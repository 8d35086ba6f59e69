"""Networks: any callable that turns a noisy text into context outputs will do; these are ours."""
