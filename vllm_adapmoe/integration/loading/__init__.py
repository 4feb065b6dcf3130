"""Loads a checkpoint's experts into records and slots: identity, packs, memory."""
