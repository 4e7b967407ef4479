"""Names of a dense model's linear layers, as Llama and the families like it call them."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = (*ATTENTION, *MLP)
# Linear maps that some families store as one, in order of their rows.
FUSED = {"qkv_proj": ATTENTION[:3], "gate_up_proj": MLP[:2]}
# What stands for the experts of all layers among the names of linear layers that get an adapter.
EXPERTS = "experts"
