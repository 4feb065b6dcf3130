"""From a checkpoint to records and slots: identity, packs, memory."""
