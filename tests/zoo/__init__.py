"""Small models in the architectures and idioms that people use, none of which knows jaxfa."""

from tests.zoo import generative, language, others, sequences, stacks, transformers, vision

FAMILIES = (language, transformers, vision, sequences, generative, others, stacks)
MODELS = {model.name: model for family in FAMILIES for model in family.MODELS}
