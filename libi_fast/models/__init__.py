"""Models, likelihoods, proposals and closed forms."""
