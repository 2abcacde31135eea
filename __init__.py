"""sigmoe: train sparse mixture-of-experts language models and cut exact domain submodels out of them."""
