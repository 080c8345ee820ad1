// A team of threads that runs one function at a time: every thread calls it once, and meets the others at barriers.
#ifndef G3N_POOL_H
#define G3N_POOL_H

typedef struct Team Team;

// One thread's place in a region.
typedef struct {
    Team *team;
    int thread, threads;
    int phase;  // loops begun so far in this region
} Place;

typedef void (*Region)(Place *place, void *argument);

// An OpenMP library's calls (GCC's interface, which LLVM's and Intel's have too).
typedef struct {
    void (*parallel)(void (*function)(void *), void *argument, unsigned threads, unsigned flags);  // GOMP_parallel
    int (*thread)(void);   // omp_get_thread_num
    int (*threads)(void);  // omp_get_num_threads
} OpenMP;

// How many threads regions have, the caller's among them.
void pool_threads(int count);
// Has regions run on OpenMP's threads.
void pool_share(const OpenMP *openmp);
void pool_run(Region region, void *argument);

// The next item of the loop that all threads are in; items go to whoever comes first.
long next_item(Place *place);
// Ends a loop: waits until all threads have ended it.
void end_loop(Place *place);

#define EACH(place, item, count) (long item; (item = next_item(place)) < (count);)

#endif
