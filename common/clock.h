/* SPDX-License-Identifier: Apache-2.0 */
/* clock.h: the time, for what takes how long. */
#ifndef SPARGE_COMMON_CLOCK_H
#define SPARGE_COMMON_CLOCK_H

double sparge_seconds(void); /* since some moment; never runs backwards */

#endif
