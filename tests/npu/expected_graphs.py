"""What torchair makes of each form of the stage: the operators in order, without constants and copies.

Fragments are named after what they come from, so that a line reads like the stage. An operator that is not here is a change to
look at: one more is one more kernel in every layer.
"""

IS_REAL = "Range Cast Less"
IS_ACTIVE = f"{IS_REAL} LogicalAnd"
RENORMALIZE = "ReduceSum Add RealDiv"
NOT_NAN = "NotEqual ReduceAny LogicalNot"
GATING = "SelectV2 MoeGatingTopK SelectV2"  # of rows with NaN it gets zeros, and their scores are NaN after it
ROUTE = f"Cast {NOT_NAN} {GATING} Cast GatherElements {RENORMALIZE}"
# Of other rows neither logits nor choices.
ROUTE_ACTIVE = f"Cast Unsqueeze {NOT_NAN} LogicalAnd {GATING} Cast GatherElements SelectV2 SelectV2 {RENORMALIZE}"
# Experts that a row did not choose, and which of them stands in for each choice of nothing.
FREE_EXPERTS = "Range Cast Unsqueeze Equal ReduceAny Cast TopKV2 Cast"
STAND_INS = f"{FREE_EXPERTS} LogicalNot Cast Cumsum Sub ClipByValueV2 GatherElements Cast"
DISPATCH = "GreaterEqual Range Cast SelectV2 MoeDistributeDispatchV2"
DISPATCH_WITH_GAPS = f"GreaterEqual {STAND_INS} SelectV2 MoeDistributeDispatchV2"
COMBINE = "MoeDistributeCombineV2 ReduceAny SelectV2"
EXPERTS = "Transpose GroupedMatmul SwiGlu Transpose GroupedMatmul"
PACKED_EXPERTS = "GroupedMatmul SwiGlu GroupedMatmul"
INT8_EXPERTS = "Cast Transpose GroupedMatmul SwiGlu DynamicQuant Cast Transpose GroupedMatmul"
PACKED_INT8_EXPERTS = "Cumsum GroupedMatmulSwigluQuantV2 Cast GroupedMatmul"
SHARED_EXPERTS = "Transpose MatMul SwiGlu Transpose MatMul Add"
CHUNK = "ConcatV2 Reshape GatherV2"
SOURCES = "Range Cast Unsqueeze BroadcastTo GreaterEqual SelectV2 Reshape Reshape ScatterElements StridedSliceV2"
PERMUTE = "Sub GreaterEqual Less LogicalAnd SelectV2 Reshape MoeInitRoutingV3 Reshape SelectV2 Cast"
UNUSED_PLACE = "Range Cast SelectV2 ArgMaxWithValue Cast"
UNPERMUTE = (
    # Rows, weights and positions of choices, each with what stands for nothing; then in the dtypes of the op.
    f"GreaterEqual {SOURCES} Less {UNUSED_PLACE} Unsqueeze SelectV2 Reshape SelectV2 Cast SelectV2 Cast Reshape Cast "
    "MoeFinalizeRoutingV2 Cast"
)


def pack(num_tensors: int) -> str:
    return " ".join([*["Reshape Bitcast"] * num_tensors, *["Reshape"] * num_tensors, "ConcatV2"])


def unpack(num_tensors: int) -> str:
    return " ".join([*["StridedSliceV2"] * num_tensors, *["Reshape Bitcast"] * num_tensors, "Reshape"])


LOCAL_EXPERTS = f"{PERMUTE} {EXPERTS} {UNPERMUTE}"
MC2_ROUTE = f"{IS_ACTIVE} {ROUTE_ACTIVE}"
RAGGED = 8  # ranks, each of which has a block of rows

EXPECTED = {
    "mc2": f"{MC2_ROUTE} {DISPATCH} {EXPERTS} {COMBINE}",
    "mc2-tp": f"{CHUNK} {CHUNK} {CHUNK} {MC2_ROUTE} {DISPATCH} {EXPERTS} {COMBINE} HcomAllGather",
    "mc2-shared": f"{MC2_ROUTE} {DISPATCH} {EXPERTS} {COMBINE} {SHARED_EXPERTS}",
    "mc2-packed": f"{MC2_ROUTE} {DISPATCH} {PACKED_EXPERTS} {COMBINE}",
    "mc2-w8a8": f"{MC2_ROUTE} {DISPATCH} {INT8_EXPERTS} {COMBINE}",
    "mc2-w8a8-packed": f"{MC2_ROUTE} {DISPATCH} {PACKED_INT8_EXPERTS} {COMBINE}",
    "mc2-deepseek": f"{IS_ACTIVE} {ROUTE_ACTIVE} Mul Cast {DISPATCH} {EXPERTS} {COMBINE}",
    "mc2-sqrtsoftplus": (
        f"{IS_ACTIVE} Cast Unsqueeze Exp Log1p Greater SelectV2 Sqrt TopKV2 Cast StridedSliceV2 GatherElements "
        f"SelectV2 SelectV2 {RENORMALIZE} Cast {DISPATCH} {EXPERTS} {COMBINE}"
    ),
    "mc2-eplb": (
        f"{MC2_ROUTE} Unsqueeze GreaterEqual Cast TopKV2 Cast GatherElements ClipByValueV2 Cast GreaterEqual Cast ReduceSum "
        f"IndexByTensor ClipByValueV2 Range Cast Unsqueeze FloorMod IndexByTensor GreaterEqual SelectV2 Cast "
        f"{DISPATCH_WITH_GAPS} {EXPERTS} {COMBINE}"
    ),
    "all2all-fixed": f"{CHUNK} {CHUNK} {IS_REAL} {ROUTE_ACTIVE} {DISPATCH} {EXPERTS} {COMBINE} HcomAllGather",
    "allgather-dp": f"{ROUTE} {pack(3)} HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter HcomAllReduce",
    "allgather-pcp": (
        # Between the two gathers nothing is done to the rows, so their bytes are only looked at anew.
        f"{ROUTE} {pack(3)} HcomAllGather {unpack(3).removesuffix(' Reshape')} Bitcast Bitcast Bitcast Reshape Reshape Reshape "
        f"ConcatV2 HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter HcomReduceScatter"
    ),
    "allgather-ep": f"{ROUTE} {pack(3)} HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter",
    "allgather-ep-ragged": (
        f"{ROUTE} {pack(3)} ConcatV2 ConcatV2 HcomAllGather {'StridedSliceV2 ' * RAGGED}ConcatV2 {unpack(3)} {LOCAL_EXPERTS} "
        f"{'StridedSliceV2 ' * (2 * RAGGED)}ConcatV2 HcomReduceScatter StridedSliceV2"
    ),
    "allgather-ep-w8a8": (
        f"DynamicQuant {ROUTE} {pack(4)} HcomAllGather {unpack(4)} {PERMUTE} {SOURCES} ClipByValueV2 Reshape GatherV2 "
        f"{INT8_EXPERTS} {UNPERMUTE} HcomReduceScatter"
    ),
}

MX_EXPERTS = (
    "Cumsum Transpose Reshape Transpose Reshape Bitcast Bitcast GroupedMatmulSwigluQuantV2 Bitcast Transpose Reshape "
    "Bitcast Bitcast GroupedMatmul"
)
EXPECTED_ON_A5 = {
    "mc2": EXPECTED["mc2"],
    "mc2-w8a8-packed": EXPECTED["mc2-w8a8"],  # there is no packing for this chip
    "mc2-mxfp8": f"{MC2_ROUTE} {DISPATCH} Bitcast Bitcast Bitcast {MX_EXPERTS} {COMBINE}",
    "allgather-ep-mxfp8": (
        f"DynamicMxQuant Reshape Bitcast {ROUTE} {pack(4)} HcomAllGather {unpack(4)} "
        f"{PERMUTE.replace('Reshape MoeInit', 'MoeInit')} {SOURCES} ClipByValueV2 Reshape GatherV2 Reshape GatherV2 "
        f"Bitcast Bitcast {MX_EXPERTS} {UNPERMUTE} HcomReduceScatter"
    ),
}
