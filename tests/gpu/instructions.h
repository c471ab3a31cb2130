/* SPDX-License-Identifier: Apache-2.0 */
/* instructions.h: what the questions of instructions.cu and products.cu share. */
#ifndef SPARGE_TESTS_GPU_INSTRUCTIONS_H
#define SPARGE_TESTS_GPU_INSTRUCTIONS_H

#include "common/half.h"
#include "gpu/hopper.h"
#include "tests/gpu/program.h"

#include <math.h>
#include <stdarg.h>
#include <string>

/* What is wrong; begins with "ok" if nothing is. */
typedef std::string verdict;

__attribute__((format(printf, 1, 2))) static inline verdict say(const char *format, ...)
{
    char text[400];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return text;
}

struct question {
    const char *name;
    bool hopper; /* needs sm_90a */
    verdict (*ask)();
};

/* Of products.cu and language.cu. */
std::vector<question> product_questions(), language_questions();

#endif
