"""The live stream: `docs/protocol.md` as a state machine without a network, and the thin part that has one."""
