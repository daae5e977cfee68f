//! Work on several threads. Replaces nothing in `plain`, which has one.
//! Faster: by the number of cores, less what they wait for memory together. Gain: see NOTES.md, two threads beside one.

use std::sync::Mutex;

use crate::Error;

/// The number of threads to use: `wanted`, but at least one and at most as many as the machine runs at once.
pub fn worker_threads(wanted: Option<usize>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    wanted.unwrap_or(cores).clamp(1, cores)
}

/// Processes the first item on this thread and each other item on its own thread, and returns the results in order. Items whose
/// thread cannot be started are processed here, too. The threads end with the call: a lasting pool would deadlock in a forked child,
/// and starting a thread costs only microseconds.
pub fn in_parallel<I: Send, T: Send>(
    items: impl IntoIterator<Item = I>,
    work: impl Fn(I) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let work = |item: &Mutex<Option<I>>| work(item.lock().expect("taken once").take().expect("taken once"));
    let (work, Some((first, others))) = (&work, items.split_first()) else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let start = |item| (item, std::thread::Builder::new().spawn_scoped(scope, move || work(item)));
        let others: Vec<_> = others.iter().map(start).collect();
        let first = work(first);
        let others = others.into_iter().map(|(item, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => work(item),
        });
        std::iter::once(first).chain(others).collect()
    })
}
