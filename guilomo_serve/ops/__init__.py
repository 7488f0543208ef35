"""The routed product of a LoRA-MoE layer, in several implementations of one signature.

    reference.py  a loop over experts, as the formula reads; in float64 it is the truth
    torch_ops.py  the fused form: two products with a gate between them

The maths (shapes: tokens T, experts E, total rank R):

    z  = W_r x                           router logits in float32           [T, E]
    w  = top-k of softmax(z), renormalised over the chosen experts          [T, E]
    y += sum_e w_e s_e B_e (A_e x)                                          [T, out]

Importing this package needs torch alone.
"""
