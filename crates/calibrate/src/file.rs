//! Safetensors files that are either complete or not there.

use crate::CalibrationError;
use safetensors::tensor::{Dtype, SafeTensors, TensorInfo};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Numbers with a shape.
pub(crate) struct Array<T> {
    pub shape: Vec<usize>,
    pub values: Vec<T>,
}

/// A file's tensors and metadata.
#[derive(Default)]
pub(crate) struct Contents {
    pub metadata: BTreeMap<String, String>,
    pub floats: Vec<(String, Array<f32>)>,
    pub doubles: Vec<(String, Array<f64>)>,
    pub integers: Vec<(String, Array<u32>)>,
}

/// An entry of a file's header.
#[derive(Serialize)]
#[serde(untagged)]
enum Entry<'a> {
    Metadata(&'a BTreeMap<String, String>),
    Tensor(TensorInfo),
}

/// Largest file that is read; what calibration makes is far smaller.
const MAX_BYTES: u64 = 8 << 30;

impl Contents {
    /// Writes the file beside its place, makes it durable and moves it there.
    pub(crate) fn write(&self, path: &Path) -> Result<(), CalibrationError> {
        let problem = |source| CalibrationError::Write { path: path.to_owned(), source };
        // What is moved to a device or a pipe takes its place.
        if path.exists() && !path.is_file() {
            return Err(problem(std::io::Error::other("it is not a file")));
        }
        // A link is followed.
        let target = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let directory = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        builder.prefix(".dibit-");
        // As for every new file, the umask decides what of this is left.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(directory).map_err(problem)?;
        file.write_all(&self.bytes()).map_err(problem)?;
        file.as_file().sync_all().map_err(problem)?;
        file.persist(target).map_err(|error| problem(error.error))?;
        Ok(())
    }

    /// The bytes of the file. The same contents make the same bytes, which the library's own hash maps do not.
    fn bytes(&self) -> Vec<u8> {
        let mut header = BTreeMap::from([("__metadata__", Entry::Metadata(&self.metadata))]);
        let mut data = Vec::new();
        let mut add = |name, dtype, shape: &[usize], bytes: Vec<u8>| {
            let data_offsets = (data.len(), data.len() + bytes.len());
            header.insert(name, Entry::Tensor(TensorInfo { dtype, shape: shape.to_vec(), data_offsets }));
            data.extend(bytes);
        };
        // The widest first, so that all are aligned.
        for (name, Array { shape, values }) in &self.doubles {
            add(name, Dtype::F64, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        for (name, Array { shape, values }) in &self.floats {
            add(name, Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        for (name, Array { shape, values }) in &self.integers {
            add(name, Dtype::U32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect());
        }
        let mut header = serde_json::to_vec(&header).expect("strings and numbers");
        header.resize(header.len().next_multiple_of(8), b' ');
        [&(header.len() as u64).to_le_bytes(), &header[..], &data].concat()
    }

    pub(crate) fn read(path: &Path) -> Result<Self, CalibrationError> {
        let problem = |source| CalibrationError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(problem)?.len();
        if size > MAX_BYTES {
            let problem = format!("it has {size} bytes");
            return Err(CalibrationError::Malformed { path: path.to_owned(), problem });
        }
        Self::parse(&std::fs::read(path).map_err(problem)?, path)
    }

    /// The contents of a file's bytes; `path` names it in errors.
    pub(crate) fn parse(bytes: &[u8], path: &Path) -> Result<Self, CalibrationError> {
        let malformed = |problem: String| CalibrationError::Malformed { path: path.to_owned(), problem };
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| malformed(error.to_string()))?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| malformed(error.to_string()))?;
        let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        let mut contents = Contents { metadata, ..Contents::default() };
        for (name, view) in tensors.iter() {
            let (name, shape) = (name.to_owned(), view.shape().to_vec());
            match view.dtype() {
                Dtype::F32 => {
                    contents.floats.push((name, Array { shape, values: numbers(view.data(), f32::from_le_bytes) }))
                }
                Dtype::F64 => {
                    contents.doubles.push((name, Array { shape, values: numbers(view.data(), f64::from_le_bytes) }));
                }
                Dtype::U32 => {
                    contents.integers.push((name, Array { shape, values: numbers(view.data(), u32::from_le_bytes) }));
                }
                other => return Err(malformed(format!("tensor {name} is of type {other:?}"))),
            }
        }
        if contents.floats.iter().any(|(_, array)| array.values.iter().any(|x| !x.is_finite()))
            || contents.doubles.iter().any(|(_, array)| array.values.iter().any(|x| !x.is_finite()))
        {
            return Err(malformed("it holds numbers that are not finite".into()));
        }
        Ok(contents)
    }
}

fn numbers<const SIZE: usize, T>(bytes: &[u8], number: impl Fn([u8; SIZE]) -> T) -> Vec<T> {
    bytes.chunks_exact(SIZE).map(|bytes| number(bytes.try_into().expect("bytes of one number"))).collect()
}
