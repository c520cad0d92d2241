#include "reader_judge.h"

#include <stdlib.h>
#include <string.h>

enum { TRIAL = JUDGE_TURN * JUDGE_TURNS, EACH = JUDGE_TURNS / 2 * (JUDGE_TURN - 1) };

static bool turn_helps(uint32_t window) { return window / JUDGE_TURN % 2; }

bool judge_next(struct judge *j)
{
    if (j->windows == TRIAL + JUDGE_STAY)
        memset(j, 0, sizeof *j);
    return j->windows < TRIAL ? turn_helps(j->windows) : j->helps;
}

static int by_value(const void *a, const void *b)
{
    const uint32_t *x = a, *y = b;
    return (*x > *y) - (*x < *y);
}

static uint64_t median(uint32_t *taken)
{
    qsort(taken, EACH, sizeof *taken, by_value);
    return taken[EACH / 2];
}

void judge_took(struct judge *j, uint64_t ns, uint64_t bytes)
{
    uint32_t window = j->windows;
    if (ns > JUDGE_MOST_NS) /* so a trial ends with as many of both */
        return;
    j->windows++;
    if (window >= TRIAL)
        return;
    bool helped = turn_helps(window);
    if (window % JUDGE_TURN)
        j->taken[helped][j->ntaken[helped]++] = (uint32_t)((ns << 20) / bytes);
    if (j->windows == TRIAL)
        j->helps = median(j->taken[1]) * (JUDGE_GAIN + 1) < median(j->taken[0]) * JUDGE_GAIN;
}
