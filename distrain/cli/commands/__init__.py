"""What each command of ``distrain`` does before torch is imported: one file a command, with a ``main`` each."""
