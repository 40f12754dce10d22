"""PTX text -> instructions (parser) -> basic blocks with liveness (flow) -> Python (emit)."""
