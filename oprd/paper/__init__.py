"""The paper's questions on a task small enough for two cores: ``oprd-paper``."""
