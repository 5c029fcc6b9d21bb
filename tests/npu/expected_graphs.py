"""What torchair makes of each form of the stage: the operators in order, without constants and copies.

Fragments are named after what they come from, so that a line reads like the stage. An operator that is not here is a change to
look at: one more is one more kernel in every layer.
"""

RENORMALIZE = "ReduceSum Add RealDiv"
NOT_NAN = "NotEqual ReduceAny LogicalNot"
GATING = "SelectV2 MoeGatingTopK SelectV2"  # of rows with NaN it gets zeros, and their scores are NaN after it
ROUTE = f"Cast {NOT_NAN} {GATING} Cast GatherElements {RENORMALIZE}"
# Of rows that the mask leaves out neither logits nor choices.
ACTIVE_SCORES = f"Unsqueeze Cast {NOT_NAN} LogicalAnd {GATING} Cast GatherElements SelectV2 {RENORMALIZE}"
ROUTE_ACTIVE = f"{ACTIVE_SCORES} SelectV2"
# Of a choice that the caller made: what is an expert's id and in a row that the mask keeps, in the dtypes of the library.
GIVEN = "GreaterEqual Less LogicalAnd Unsqueeze LogicalAnd SelectV2 Cast Cast SelectV2"
# Which choices are the same, which of them come later, and the weights of all that are.
IS_REPEATED = "Unsqueeze Unsqueeze Equal Range Cast Unsqueeze Unsqueeze Less LogicalAnd ReduceAny"
MERGE_REPEATED = f"{IS_REPEATED} Unsqueeze SelectV2 ReduceSum SelectV2"
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
CHUNKS = 3 * "ConcatV2 Reshape GatherV2 "  # of hidden states, ids and weights: logits are never chunked
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
OWN_MASK = "Range Cast Add GatherV2"  # of the mask of the TP group what is of this rank's shard
RAGGED = 8  # ranks, each of which has a block of rows

EXPECTED = {
    "mc2": f"{ROUTE_ACTIVE} {DISPATCH} {EXPERTS} {COMBINE}",
    "mc2-tp": f"StridedSliceV2 {ROUTE_ACTIVE} {CHUNKS}{DISPATCH} {EXPERTS} {COMBINE} HcomAllGather StridedSliceV2",
    "mc2-given": f"TopKV2 Cast {GIVEN} {MERGE_REPEATED} {DISPATCH_WITH_GAPS} {EXPERTS} {COMBINE}",
    "mc2-shared": f"{ROUTE} {DISPATCH} {EXPERTS} {COMBINE} {SHARED_EXPERTS}",
    "mc2-packed": f"{ROUTE_ACTIVE} {DISPATCH} {PACKED_EXPERTS} {COMBINE}",
    "mc2-w8a8": f"{ROUTE_ACTIVE} {DISPATCH} {INT8_EXPERTS} {COMBINE}",
    "mc2-w8a8-packed": f"{ROUTE_ACTIVE} {DISPATCH} {PACKED_INT8_EXPERTS} {COMBINE}",
    "mc2-deepseek": f"{ACTIVE_SCORES} Mul Cast SelectV2 {DISPATCH} {EXPERTS} {COMBINE}",
    "mc2-sqrtsoftplus": (
        f"Unsqueeze Cast Exp Log1p Greater SelectV2 Sqrt TopKV2 Cast StridedSliceV2 GatherElements SelectV2 {RENORMALIZE} "
        f"SelectV2 Cast {DISPATCH} {EXPERTS} {COMBINE}"
    ),
    "mc2-eplb": (
        f"{ROUTE_ACTIVE} Unsqueeze GreaterEqual Cast TopKV2 Cast GatherElements ClipByValueV2 Cast GreaterEqual Cast ReduceSum "
        f"IndexByTensor ClipByValueV2 Range Cast Unsqueeze FloorMod IndexByTensor GreaterEqual SelectV2 Cast "
        f"{DISPATCH_WITH_GAPS} {EXPERTS} {COMBINE}"
    ),
    "all2all-fixed": f"{ROUTE} {CHUNKS}{DISPATCH} {EXPERTS} {COMBINE} HcomAllGather",
    "allgather-dp": f"{ROUTE} {pack(3)} HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter HcomAllReduce",
    "allgather-pcp": (
        # Between the two gathers nothing is done to the rows, so their bytes are only looked at anew.
        f"{ROUTE_ACTIVE} {pack(3)} HcomAllGather {unpack(3).removesuffix(' Reshape')} Bitcast Bitcast Bitcast "
        f"Reshape Reshape Reshape ConcatV2 HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter HcomReduceScatter"
    ),
    "allgather-ep": f"{ROUTE} {pack(3)} HcomAllGather {unpack(3)} {LOCAL_EXPERTS} HcomReduceScatter",
    "allgather-ep-ragged": (
        f"{OWN_MASK} {ROUTE_ACTIVE} {pack(3)} ConcatV2 ConcatV2 HcomAllGather {'StridedSliceV2 ' * RAGGED}ConcatV2 "
        f"{unpack(3)} {LOCAL_EXPERTS} {'StridedSliceV2 ' * (2 * RAGGED)}ConcatV2 HcomReduceScatter StridedSliceV2"
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
    "mc2-mxfp8": f"{ROUTE_ACTIVE} {DISPATCH} Bitcast Bitcast Bitcast {MX_EXPERTS} {COMBINE}",
    "allgather-ep-mxfp8": (
        f"DynamicMxQuant Reshape Bitcast {ROUTE} {pack(4)} HcomAllGather {unpack(4)} "
        f"{PERMUTE.replace('Reshape MoeInit', 'MoeInit')} {SOURCES} ClipByValueV2 Reshape GatherV2 Reshape GatherV2 "
        f"Bitcast Bitcast {MX_EXPERTS} {UNPERMUTE} HcomReduceScatter"
    ),
}
