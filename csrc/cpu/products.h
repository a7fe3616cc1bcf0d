// The products of samples, weights and grad_y, a class for each kind. Their common interface, where `outs` are output
// channels, `block` is a block of taps and Scratch is a thread's work space in the backward pass:
//
//   Element, Operand                        types of the arrays and of the factors
//   ForwardWeightSize, PackForwardWeight    the weight as Output takes it
//   out_parts, Outs                         how threads may share the output channels
//   Output                                  sums (+)= samples * weight, for these outs and perhaps more
//   BackwardWeightSize, PackBackwardWeight  the weight as GradSamples takes it
//   PackGradY                               grad_y of a tile and a slice, for the next three
//   SumGradY                                grad_bias (+)= the sum of grad_y over the pixels
//   GradSamples                             grad_samples = grad_y * transposed weight
//   GradWeight                              grad_weight (+)= transposed samples * grad_y, in the order of NHWC; the
//                                           samples may be overwritten
//
// samples and grad_samples are (pixels, taps of the block, channels of the slice), sums are (pixels, c_out).

#pragma once

#include "depthwise_products.h"
#include "grouped_products.h"
